"""A mean over prompts with its interval."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["Estimate"]

_RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, per_prompt: Float[np.ndarray, " prompts"], seed: int) -> "Estimate":
        """From one number a prompt."""
        picks = np.random.default_rng(seed).integers(0, len(per_prompt), (_RESAMPLES, len(per_prompt)))
        low, high = np.percentile(per_prompt[picks].mean(axis=1), [2.5, 97.5])
        return cls(float(per_prompt.mean()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
