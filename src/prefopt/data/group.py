"""The one structure that carries all of it: a prompt with K completions, as token ids."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from prefopt.records import Source

__all__ = ["Completion", "CompletionGroup"]


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of one completion and which of them are trained on (False: later user turns)."""

    ids: Int32[np.ndarray, " tokens"]
    trainable: Bool[np.ndarray, " tokens"]

    @property
    def scored_tokens(self) -> int:
        """How many tokens enter the log-probability."""
        return int(self.trainable.sum())


@dataclass(frozen=True, slots=True)
class CompletionGroup:
    """A prompt (at least one token) with K completions; a pair is K=2, the chosen one first.

    `weight` multiplies the group's loss. `label` is the probability that the first completion is the
    better one; of a single one that somebody rated, the probability that it is good. `source` names
    the row it was made from. `truncated` says that a completion lost its end to the length limit.
    `place` is its number among the groups it was stored with (`data/store.py`), or None. `margin` is by
    how much the first completion of a pair is the better one.
    """

    prompt_ids: Int32[np.ndarray, " prompt"]
    completions: tuple[Completion, ...]
    source: Source
    weight: float = 1.0
    truncated: bool = False
    place: int | None = None
    label: float = 1.0
    margin: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens a packed row spends on this group: the prompt once, then every completion."""
        return len(self.prompt_ids) + sum(len(c.ids) for c in self.completions)

    @property
    def scored_tokens(self) -> int:
        """How many tokens of all completions enter a log-probability."""
        return sum(completion.scored_tokens for completion in self.completions)

    def sequence_key(self, k: int) -> bytes:
        """Content hash of (prompt, k-th completion, its mask): what a cached log-probability is of."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.prompt_ids, self.completions[k].ids, self.completions[k].trainable):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()
