"""How well scores agree with preferences: accuracy, calibration, and how much of it is length.

Over all pairs of completions that a row compares: one of a pair, K * (K - 1) / 2 of a ranking. Rows of
one prompt are not independent, so intervals are over prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy.special import expit
from scipy.stats import norm

from prefopt.data.group import CompletionGroup

__all__ = ["Agreement", "Bin", "Interval", "agreement", "wilson"]

_RESAMPLES = 2000
# Of the probability that the better-scored completion is the better one.
_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Pairs whose better-scored completion is so probably the better one.

    Attributes:
        low, high: Of the predicted probability, sigmoid(score difference), 0.5 at least.
        pairs: How many.
        predicted: Their mean prediction.
        observed: The share that is right, and its 95% Wilson interval.
    """

    low: float
    high: float
    pairs: int
    predicted: float
    observed: float
    observed_low: float
    observed_high: float


@dataclass(frozen=True)
class Agreement:
    """What scores say of held-out preferences.

    Attributes:
        pairs, prompts: What it is over.
        accuracy: Share of pairs whose better completion scores higher; a tie counts half, and a pair of
            which a judge is sure by p counts p one way and 1 - p the other.
        interval: Of the accuracy, 95%: bootstrap over prompts.
        bins: Calibration; only bins with pairs.
        calibration_error: Mean over pairs of |predicted - observed| of their bin.
        length_correlation: Of score difference and length difference, about zero, since a pair has no order.
        longer_preferred: Of pairs of unequal length, the share whose longer completion scores higher.
        longer_chosen: The share whose longer completion is the better one.
    """

    pairs: int
    prompts: int
    accuracy: float
    interval: Interval
    bins: tuple[Bin, ...]
    calibration_error: float
    length_correlation: float
    longer_preferred: float
    longer_chosen: float

    def metrics(self) -> dict[str, float]:
        """The numbers by the names they are logged under."""
        return {
            "accuracy": self.accuracy,
            "accuracy/low": self.interval.low,
            "accuracy/high": self.interval.high,
            "calibration_error": self.calibration_error,
            "length/correlation": self.length_correlation,
            "length/longer_preferred": self.longer_preferred,
            "length/longer_chosen": self.longer_chosen,
        }

    def calibration(self) -> list[dict[str, Any]]:
        """The bins as JSON."""
        return [asdict(one) for one in self.bins]


@dataclass(frozen=True)
class _Pairs:
    """Each pair once, the completion that is ranked higher first."""

    difference: Float64[np.ndarray, " pairs"]  # of scores
    longer: Float64[np.ndarray, " pairs"]  # by how many tokens
    label: Float64[np.ndarray, " pairs"]  # probability that the first is the better
    prompt: Int64[np.ndarray, " pairs"]

    @property
    def right(self) -> Float64[np.ndarray, " pairs"]:
        """How much of each pair is right."""
        return _share(self.difference, self.label)


def agreement(
    groups: Sequence[CompletionGroup], scores: Float64[np.ndarray, "groups most"], *, seed: int = 0
) -> Agreement:
    """Compare the scores of each group's completions with their order.

    Args:
        scores: In the order of `groups` and of their completions; what stands behind the last is not looked at.
        seed: Of the bootstrap.

    Raises:
        ValueError: there is no pair to compare.
    """
    pairs = _pairs(groups, scores)
    if not len(pairs.label):
        raise ValueError("no two completions of a prompt to compare")
    right = pairs.right
    bins = _bins(pairs, right)
    unequal = pairs.longer != 0
    longer = np.sign(pairs.longer[unequal])
    label = pairs.label[unequal]
    size = np.sqrt(np.square(pairs.difference).sum() * np.square(pairs.longer).sum())
    return Agreement(
        pairs=len(right),
        prompts=len(np.unique(pairs.prompt)),
        accuracy=float(right.mean()),
        interval=_over_prompts(right, pairs.prompt, seed),
        bins=bins,
        calibration_error=sum(b.pairs * abs(b.predicted - b.observed) for b in bins) / len(right),
        length_correlation=float(pairs.difference @ pairs.longer / size) if size else 0.0,
        longer_preferred=_mean(_share(pairs.difference[unequal] * longer, np.ones(len(longer)))),
        longer_chosen=_mean(np.where(longer > 0, label, 1 - label)),
    )


def _pairs(groups: Sequence[CompletionGroup], scores: Float64[np.ndarray, "groups most"]) -> _Pairs:
    found: list[tuple[float, float, float, int]] = []
    prompts: dict[bytes, int] = {}
    for group, own in zip(groups, scores, strict=True):
        prompt = prompts.setdefault(group.prompt_ids.tobytes(), len(prompts))
        tokens = [len(completion.ids) for completion in group.completions]
        first, second = np.triu_indices(len(tokens), 1)
        found += [
            (own[i] - own[j], tokens[i] - tokens[j], group.label, prompt) for i, j in zip(first, second, strict=True)
        ]
    columns = np.array(found, dtype=np.float64).reshape(-1, 4)
    return _Pairs(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3].astype(np.int64))


def _share(
    difference: Float64[np.ndarray, " pairs"], label: Float64[np.ndarray, " pairs"]
) -> Float64[np.ndarray, " pairs"]:
    return np.where(difference > 0, label, np.where(difference < 0, 1 - label, 0.5))


def _mean(values: Float64[np.ndarray, " pairs"]) -> float:
    """A half where nothing speaks for either side."""
    return float(values.mean()) if len(values) else 0.5


def _bins(pairs: _Pairs, right: Float64[np.ndarray, " pairs"]) -> tuple[Bin, ...]:
    """By the probability of the side that the scores favour."""
    predicted = expit(np.abs(pairs.difference))
    place = np.clip(np.searchsorted(_EDGES, predicted, side="right") - 1, 0, len(_EDGES) - 2)
    found = []
    for number, (low, high) in enumerate(zip(_EDGES, _EDGES[1:], strict=False)):
        inside = place == number
        if count := int(inside.sum()):
            observed = float(right[inside].mean())
            interval = wilson(observed, count)
            mean = float(predicted[inside].mean())
            found.append(Bin(low, high, count, mean, observed, interval.low, interval.high))
    return tuple(found)


def _over_prompts(right: Float64[np.ndarray, " pairs"], prompt: Int64[np.ndarray, " pairs"], seed: int) -> Interval:
    """Percentile bootstrap of the share, whole prompts drawn again.

    Where every prompt has the same share there is nothing to draw: Wilson's interval, a prompt being one trial.
    """
    hits, counts = np.bincount(prompt, right), np.bincount(prompt)
    if np.ptp(hits / counts) == 0:
        return wilson(float(right.mean()), len(counts))
    random = np.random.default_rng(seed)
    shares = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        drawn = random.integers(0, len(counts), len(counts))
        shares[number] = hits[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(shares, (0.025, 0.975))
    return Interval(float(low), float(high))


def wilson(share: float, trials: int) -> Interval:
    """95% score interval of a proportion (Wilson 1927); `share * trials` need not be whole."""
    z = float(norm.ppf(0.975))
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    return Interval(max(0.0, middle - half), min(1.0, middle + half))
