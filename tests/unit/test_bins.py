"""Which groups share a micro-batch: all of them, once, within the budget, in few and even parts."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.bins import batches_by_length, best_fit_bins, consecutive_bins, micro_batches
from tiny import random_groups

LENGTHS = st.lists(st.integers(1, 300), max_size=80)


def loads(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> list[int]:
    return [sum(lengths[i] for i in part) for part in bins]


@given(LENGTHS, st.integers(1, 400))
def test_every_item_once_and_no_bin_over_the_budget_but_of_one(lengths: list[int], budget: int) -> None:
    for bins in (
        best_fit_bins(lengths, budget),
        [part.tolist() for part in consecutive_bins(np.array(lengths, dtype=np.int32), budget)],
    ):
        assert sorted(i for part in bins for i in part) == list(range(len(lengths)))
        assert all(load <= budget or len(part) == 1 for part, load in zip(bins, loads(lengths, bins), strict=True))
        assert all([lengths[i] for i in part] == sorted((lengths[i] for i in part), reverse=True) for part in bins)


def plain_best_fit(lengths: Sequence[int], budget: int) -> list[int]:
    """Loads of the bins that the textbook's best fit decreasing makes."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in bins if b + length <= budget]
        if fitting:
            bins.remove(max(fitting))
            bins.append(max(fitting) + length)
        else:
            bins.append(length)
    return bins


@given(LENGTHS, st.integers(1, 2000))
def test_as_few_bins_as_best_fit_makes_and_no_larger(lengths: list[int], budget: int) -> None:
    bins, plain = best_fit_bins(lengths, budget), plain_best_fit(lengths, budget)
    assert bins == best_fit_bins(list(lengths), budget)
    assert len(bins) == len(plain)
    assert max(loads(lengths, bins), default=0) <= max(plain, default=0)


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
@pytest.mark.parametrize("batch", [64, 256])
def test_a_step_of_usual_lengths_is_filled_to_97_percent(batch: int, budget: int) -> None:
    rng = np.random.default_rng(batch + budget)
    lengths = np.stack([m * rng.lognormal(-0.18, 0.6, batch) for m in (180, 330, 270)]).sum(0).astype(int).tolist()
    lengths = [min(n, budget) for n in lengths]
    bins = best_fit_bins(lengths, budget)
    assert len(bins) <= -(-sum(lengths) // budget) + 1
    assert sum(lengths) / (len(bins) * max(loads(lengths, bins))) >= 0.97


def test_bins_worked_by_hand() -> None:
    # Best fit into 12 makes 6 5 and 4 3 2: 11 and 9. Into 10 it makes 6 4 and 5 3 2: as few, and even.
    assert best_fit_bins([6, 5, 4, 3, 2], 12) == [[0, 2], [1, 3, 4]]
    assert [part.tolist() for part in consecutive_bins(np.array([3, 9, 4, 20, 5]), 9)] == [[3], [1], [4, 2], [0]]
    assert best_fit_bins([], 10) == [] and list(consecutive_bins(np.array([], dtype=np.int64), 10)) == []


def test_a_group_over_the_budget_stands_alone() -> None:
    groups = random_groups([(50, 50), (2, 2), (2, 3)])
    assert [[g.source.row for g in part] for part in micro_batches(groups, 20)] == [[1], [3, 2]]
    assert [[g.source.row for g in part] for part in batches_by_length(groups, 20)] == [[1], [3, 2]]
