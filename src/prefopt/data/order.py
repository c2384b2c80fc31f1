"""Which rows are in which step: a function of the seed and the data alone."""

import hashlib
from collections.abc import Sequence

import numpy as np

from prefopt.data.group import CompletionGroup

__all__ = ["rows_of_step", "split_by_prompt", "steps_per_epoch"]


def split_by_prompt(
    groups: Sequence[CompletionGroup], share: float, seed: int
) -> tuple[list[CompletionGroup], list[CompletionGroup]]:
    """(training groups, held-out groups); all groups of one prompt fall on the same side.

    Prompts are ranked by a seeded hash of their tokens and the first `share` of them (at least
    one, if `share` is positive and there are two prompts) is held out, so adding rows hardly
    moves the others. Rows of plain text have no prompt and are split one by one. Both lists keep the order of the file.
    """
    prompts = {_prompt(g) for g in groups}
    salt = str(seed).encode()
    ranked = sorted(prompts, key=lambda p: hashlib.blake2b(p, key=salt, digest_size=16).digest())
    wanted = max(1, round(share * len(ranked))) if share > 0 and len(ranked) > 1 else 0
    held = set(ranked[:wanted])
    return [g for g in groups if _prompt(g) not in held], [g for g in groups if _prompt(g) in held]


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
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [int(i) for i in order[within * batch : (within + 1) * batch]]
