"""Which groups share a micro-batch: bins of tokens, never more than a budget in each.

What a step computes does not depend on its bins: losses are summed and divided once. They decide
how much memory a step takes, and how long it waits for its largest part.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from prefopt.data.group import CompletionGroup
from prefopt.data.store import token_counts

__all__ = ["batches_by_length", "best_fit_bins", "consecutive_bins", "micro_batches"]

_HALVINGS = 8  # of the interval in which the smallest capacity is looked for


def micro_batches(groups: Sequence[CompletionGroup], tokens_per_batch: int) -> list[list[CompletionGroup]]:
    """Split one step's groups into micro-batches of at most `tokens_per_batch` tokens, longest group first in each.

    As few as can be found, filled evenly. A group longer than the budget stands alone: the budget
    bounds memory, it never drops a row.
    """
    return [[groups[i] for i in part] for part in best_fit_bins([g.tokens for g in groups], tokens_per_batch)]


def batches_by_length(groups: Sequence[CompletionGroup], tokens_per_batch: int) -> Iterator[list[CompletionGroup]]:
    """Micro-batches of a long pass, read one at a time: longest groups first, filled in that order.

    Groups of a like length share a batch, so there is little padding where a model needs it.
    """
    for part in consecutive_bins(token_counts(groups), tokens_per_batch):
        yield [groups[int(i)] for i in part]


def best_fit_bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `budget`, as few and as even as best fit makes them.

    Best fit, longest first, says how many bins there are; then it fills as many bins of the
    smallest capacity it can (MULTIFIT: Coffman, Garey and Johnson 1978). O(n log n).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    alone = [[i] for i in order if lengths[i] > budget]
    order = order[len(alone) :]
    bins = _best_fit(lengths, order, budget, len(order))
    if not bins:
        return alone
    low, high = max(lengths[order[0]], -(-sum(lengths[i] for i in order) // len(bins))), _largest(lengths, bins)
    for _ in range(_HALVINGS):
        if low >= high:
            break
        middle = (low + high) // 2
        if tighter := _best_fit(lengths, order, middle, len(bins)):
            bins, high = tighter, _largest(lengths, tighter)
        else:
            low = middle + 1
    return alone + bins


def _best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """Each item into the fullest bin with room for it; nothing if that takes more than `most` bins."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for i in order:
        at = bisect_left(rooms, (lengths[i], -1))
        if at < len(rooms):
            room, b = rooms.pop(at)
        elif len(bins) < most:
            room, b = capacity, len(bins)
            bins.append([])
        else:
            return []
        bins[b].append(i)
        insort(rooms, (room - lengths[i], b))
    return bins


def _largest(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[i] for i in part) for part in bins)


def consecutive_bins(lengths: Int[np.ndarray, " rows"], budget: int) -> Iterator[Int[np.ndarray, " part"]]:
    """Indices of `lengths`, longest first, cut wherever the next one would not fit into `budget`."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    ends = np.cumsum(lengths[order], dtype=np.int64)
    start = 0
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield order[start:stop]
        start = stop
