"""What every objective returns: a sum and a count, so that the step divides once, globally."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LossTotal"]


@dataclass(frozen=True)
class LossTotal:
    """Losses of a micro-batch before any division.

    Attributes:
        losses: One per group, differentiable; the step's loss is sum(losses) / global count.
        count: What this micro-batch adds to the global count: pairs for preference objectives,
            tokens for likelihood. Stays on the device where it is computed from a tensor.
        metrics: Per-group values to be averaged over groups for the log, detached.
    """

    losses: Float[Tensor, " groups"]
    count: int | Int[Tensor, ""]
    metrics: dict[str, Float[Tensor, " groups"]] = field(default_factory=dict)
