"""Which rows are in which step: a function of the seed and the data alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from prefopt.data.group import CompletionGroup

__all__ = ["Split", "rows_of_step", "split_by_prompt", "steps_per_epoch"]


@dataclass(frozen=True)
class Split:
    """Indices of the rows on either side, each in the order of the file."""

    train: Int64[np.ndarray, " train"]
    held_out: Int64[np.ndarray, " held_out"]


def split_by_prompt(groups: Sequence[CompletionGroup], share: float, seed: int) -> Split:
    """Hold out a share of the prompts; all groups of one prompt fall on the same side.

    Prompts are ranked by a seeded hash of their tokens and the first `share` of them (at least
    one, if `share` is positive and there are two prompts) is held out, so adding rows hardly
    moves the others. Rows of plain text have no prompt and are split one by one.
    """
    if share == 0:
        return Split(np.arange(len(groups)), np.arange(0))
    salt = str(seed).encode()
    ranks = (hashlib.blake2b(_prompt(g), key=salt, digest_size=16).digest() for g in groups)
    rank = np.fromiter(ranks, dtype="S16", count=len(groups))
    ranked = np.unique(rank)
    wanted = max(1, round(share * len(ranked))) if len(ranked) > 1 else 0
    held = rank <= ranked[wanted - 1] if wanted else np.zeros(len(rank), dtype=bool)
    return Split(np.flatnonzero(~held), np.flatnonzero(held))


def _prompt(group: CompletionGroup) -> bytes:
    """What identifies a group's prompt; plain text, whose prompt is one start token, is its own."""
    if len(group.prompt_ids) > 1:
        return group.prompt_ids.tobytes()
    return b"".join(group.sequence_key(k) for k in range(len(group.completions)))


def steps_per_epoch(rows: int, batch: int) -> int:
    """Optimiser steps that see every row once; the last one may be smaller."""
    return -(-rows // batch)


def rows_of_step(step: int, *, rows: int, batch: int, seed: int) -> list[int]:
    """Indices of the rows in optimiser step `step` (from 0, over all epochs).

    Each epoch is its own permutation drawn from (seed, epoch), so a resumed run sees the rows an
    uninterrupted one would have seen, and no row twice within an epoch.
    """
    epoch, within = divmod(step, steps_per_epoch(rows, batch))
    return [int(i) for i in _order(epoch, rows, seed)[within * batch : (within + 1) * batch]]


@lru_cache(maxsize=2)  # the epoch at hand, and the one whose first rows are fetched ahead
def _order(epoch: int, rows: int, seed: int) -> Int64[np.ndarray, " rows"]:
    return np.random.default_rng([seed, epoch]).permutation(rows)
