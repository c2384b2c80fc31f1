"""How scores agree with preferences, by hand: accuracy, its interval over prompts, calibration, length."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from prefopt.data.group import CompletionGroup
from prefopt.evaluate.preferences import agreement, wilson
from tiny import completion, group


def pair(prompt: int, chosen: int, rejected: int, label: float = 1.0) -> CompletionGroup:
    """Completions of so many tokens."""
    made = group([prompt, 1], *(completion(*range(2, 2 + n)) for n in (chosen, rejected)))
    return replace(made, label=label)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_accuracy_and_length_by_hand() -> None:
    # Right and longer; wrong, the longer one scored higher; a tie of the shorter one; right, equally long.
    groups = [pair(1, 5, 3), pair(2, 2, 4), pair(3, 1, 2), pair(4, 3, 3)]
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [3.0, 0.0]])
    found = agreement(groups, scores)
    assert (found.pairs, found.prompts) == (4, 4)
    assert found.accuracy == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.longer_chosen == pytest.approx(1 / 3)
    assert found.longer_preferred == pytest.approx((1 + 1 + 0.5) / 3)
    # Score differences 1, -1, 0, 3 and length differences 2, -2, -1, 0: 4 / sqrt(11 * 9).
    assert found.length_correlation == pytest.approx(4 / math.sqrt(99))
    turned = agreement([pair(1, 3, 5), pair(2, 4, 2), pair(3, 2, 1), pair(4, 3, 3)], -scores)
    assert turned.length_correlation == pytest.approx(found.length_correlation), "which is called chosen is no matter"


def test_a_judges_doubt_counts_both_ways_and_rankings_by_their_pairs() -> None:
    sure = agreement([pair(1, 2, 2, 0.8), pair(2, 2, 2, 0.8)], np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert sure.accuracy == pytest.approx((0.8 + 0.2) / 2)
    three = group([1], *(completion(*range(2, 2 + n)) for n in (1, 2, 3)))
    # 3 > 1, 3 > 2 are right, 1 > 2 is not; what stands behind the last completion of the pair is not looked at.
    found = agreement([three, pair(9, 2, 2)], np.array([[3.0, 1.0, 2.0], [1.0, 0.0, np.nan]]))
    assert (found.pairs, found.prompts) == (4, 2)
    assert found.accuracy == pytest.approx(3 / 4)


def test_calibration_by_hand() -> None:
    """Ten pairs at 0.65 of which 6 are right, four at 0.95 of which 3 are: off by 0.05 and 0.2."""
    differences = [logit(0.65) * (1 if i < 6 else -1) for i in range(10)] + [logit(0.95)] * 3 + [-logit(0.95)]
    groups = [pair(i, 2, 3) for i in range(14)]
    found = agreement(groups, np.array([[d, 0.0] for d in differences]))
    low, high = found.bins
    assert (low.low, low.pairs, high.low, high.pairs) == (0.6, 10, 0.9, 4)
    assert (low.predicted, low.observed) == pytest.approx((0.65, 0.6))
    assert (high.predicted, high.observed) == pytest.approx((0.95, 0.75))
    assert found.calibration_error == pytest.approx((10 * 0.05 + 4 * 0.2) / 14)
    assert (low.observed_low, low.observed_high) == pytest.approx((wilson(0.6, 10).low, wilson(0.6, 10).high))


def test_certain_and_undecided_scores_have_their_bins() -> None:
    found = agreement([pair(1, 1, 1), pair(2, 1, 1)], np.array([[1e4, -1e4], [1.0, 1.0]]))
    assert [(b.low, b.high, b.predicted) for b in found.bins] == [(0.5, 0.6, 0.5), (0.9, 1.0, 1.0)]


@pytest.mark.parametrize(("right", "trials"), [(0, 7), (3, 7), (7, 7), (55, 100)])
def test_wilson_is_scipys(right: int, trials: int) -> None:
    theirs = binomtest(right, trials).proportion_ci(0.95, method="wilson")
    ours = wilson(right / trials, trials)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_the_interval_is_over_prompts() -> None:
    """A hundred copies of each prompt's pair tell no more than one: the interval is as wide."""
    few = [pair(i, 2, 3) for i in range(20)]
    scores = np.array([[1.0, 0.0]] * 13 + [[0.0, 1.0]] * 7)
    once = agreement(few, scores)
    many = agreement([g for g in few for _ in range(100)], scores.repeat(100, axis=0))
    assert (many.prompts, many.pairs) == (20, 2000)
    assert many.accuracy == pytest.approx(13 / 20)
    assert (many.interval.low, many.interval.high) == pytest.approx((once.interval.low, once.interval.high))
    # The deviation of a share of 20 is sqrt(0.65 * 0.35 / 20) = 0.107.
    assert once.interval.high - once.interval.low == pytest.approx(2 * 1.96 * 0.107, rel=0.15)
    assert agreement(few, scores) == once


def test_prompts_that_all_agree_have_an_interval_too() -> None:
    found = agreement([pair(i, 2, 3) for i in range(10)], np.array([[1.0, 0.0]] * 10))
    theirs = binomtest(10, 10).proportion_ci(0.95, method="wilson")
    assert (found.interval.low, found.interval.high) == pytest.approx((theirs.low, theirs.high))


def test_scores_without_pairs_of_unequal_length_say_nothing_of_length() -> None:
    found = agreement([pair(1, 2, 2), pair(2, 2, 2)], np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert (found.length_correlation, found.longer_preferred, found.longer_chosen) == (0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="no two completions"):
        agreement([], np.zeros((0, 2)))
