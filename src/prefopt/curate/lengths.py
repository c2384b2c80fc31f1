"""How much longer chosen completions are than rejected ones, and how well length alone tells which is which."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

__all__ = ["Interval", "LengthGap", "length_gap"]

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95% interval: percentiles of 1,000 bootstrap samples of prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LengthGap:
    """Of pairs of completions, the better one first.

    Attributes:
        unit: What a length counts: "words" or "tokens".
        pairs, prompts: How many; the pairs of one prompt are drawn together.
        better, worse: Mean lengths.
        gap: Mean of better - worse.
        longer_is_better: Share of pairs whose better completion is the longer one; equal lengths count half.
        equal: Pairs of equal length.
    """

    unit: str
    pairs: int
    prompts: int
    better: float
    worse: float
    gap: Interval
    longer_is_better: Interval
    equal: int


def length_gap(
    better: Sequence[int], worse: Sequence[int], prompts: Sequence[int], unit: str, seed: int = 0
) -> LengthGap:
    """Compare the lengths of at least one pair.

    Args:
        better, worse: Lengths of each pair's two completions.
        prompts: A number for each pair, the same for pairs of the same prompt.
        seed: Of the bootstrap.
    """
    first, second = np.asarray(better, np.int64), np.asarray(worse, np.int64)
    gap = (first - second).astype(np.float64)
    right = (np.sign(gap) + 1) / 2
    _, cluster = np.unique(np.asarray(prompts, np.int64), return_inverse=True)
    intervals = _means(np.stack([gap, right], axis=1), cluster, seed)
    return LengthGap(
        unit=unit,
        pairs=len(gap),
        prompts=int(cluster.max()) + 1,
        better=float(first.mean()),
        worse=float(second.mean()),
        gap=intervals[0],
        longer_is_better=intervals[1],
        equal=int((gap == 0).sum()),
    )


def _means(
    values: Float64[np.ndarray, "rows columns"], cluster: Int64[np.ndarray, " rows"], seed: int
) -> list[Interval]:
    """The mean of each column; a bootstrap sample is a sum over drawn prompts divided by their number of rows."""
    prompts = int(cluster.max()) + 1
    sums = np.stack([np.bincount(cluster, column, prompts) for column in (*values.T, np.ones(len(values)))], axis=1)
    rng = np.random.default_rng(seed)
    totals = np.stack([sums[rng.integers(0, prompts, prompts)].sum(axis=0) for _ in range(_RESAMPLES)])
    low, high = np.percentile(totals[:, :-1] / totals[:, -1:], [2.5, 97.5], axis=0)
    means = values.mean(axis=0)
    return [Interval(*map(float, three)) for three in zip(means, low, high, strict=True)]
