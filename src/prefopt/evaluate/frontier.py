"""Reward against KL: the frontier of a method's points, the area beneath it, and which of two is above the other.

A method's frontier at a KL of k is the best mean reward it reached with a KL of at most k; before its
first point it is the start's own, with KL 0. Behind its last point it keeps its last value: nobody has seen the
method there.

Intervals are +-1.96 bootstrap standard errors. A replicate draws prompts (the same for every method, point and
seed, which share the test prompts) and seeds, and makes the frontiers anew from the points' means over what it drew. Of
both it draws one fewer than there are, which makes the variance of a mean unbiased (Rao and Wu 1988, "Resampling
inference with complex survey data", section 2): with three seeds the plain bootstrap loses a third of it. Of a
single seed nothing is drawn, and the interval is silent about the luck of training.

A frontier is a maximum of noisy means, and so a little too high; the more points, the more so. The bootstrap shows
that noise, it does not take the bias away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

__all__ = ["Area", "Difference", "Frontiers", "Interval", "Measured", "best_within", "mean_over"]

_GRID = 201  # KLs at which two frontiers are compared one by one
_Z = 1.959964  # of a 95% interval
_NOTHING = 1e-12  # what rounding may leave of 0


@dataclass(frozen=True)
class Measured:
    """Points of one method at one seed: a number for each test prompt, a mean over its samples.

    Attributes:
        reward: True reward.
        kl: Nats a completion.
    """

    reward: Float64[np.ndarray, "points prompts"]
    kl: Float64[np.ndarray, "points prompts"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, estimate: float, replicates: Float64[np.ndarray, " replicates"]) -> "Interval":
        """`estimate` +- 1.96 standard deviations of the replicates."""
        reach = _Z * float(np.std(replicates, ddof=1))
        return cls(float(estimate), float(estimate) - reach, float(estimate) + reach)

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 is outside."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Area:
    """Area between a method's frontier and the start's reward, from KL 0 to `end`: reward times nats.

    Attributes:
        points: Over all seeds.
        reach: KL of the frontier's last point, mean over seeds; from there to `end` its last value is kept.
        best: Highest mean reward, mean over seeds.
    """

    method: str
    seeds: int
    points: int
    area: Interval
    best: Interval
    reach: float
    end: float


@dataclass(frozen=True)
class Difference:
    """How far one frontier is above another.

    Attributes:
        start, end: Range of KL where both have points at every seed they share; None where there is none.
        mean: Of the first's reward minus the second's over that range.
        above, below: Ranges of KL in which the first is above, or below, beyond a simultaneous 95% band:
            the claims hold at all these KLs together. Behind its last point a method may still be above another,
            since it got more with less, but never below.
    """

    first: str
    second: str
    start: float | None
    end: float | None
    mean: Interval | None
    above: tuple[tuple[float, float], ...]
    below: tuple[tuple[float, float], ...]

    @property
    def sentence(self) -> str:
        """Which is above where, and whether that is beyond the noise."""
        one, other = self.first, self.second
        parts = [f"{one} is above at KL {_ranges(self.above)}"] if self.above else []
        parts += [f"{other} is above at KL {_ranges(self.below)}"] if self.below else []
        where = " and ".join(parts)
        if self.mean is None:
            apart = f"{one} and {other} have no range of KL in common"
            return f"{apart}, but with less KL {where}." if where else f"{apart}: not compared."
        over = f"over KL {self.start:.2g}\N{EN DASH}{self.end:.2g}, where both have points"
        if self.mean.beyond_noise:
            top, bottom = (one, other) if self.mean.value > 0 else (other, one)
            size = f"{abs(self.mean.value):.3f} [{min(map(abs, self._ends)):.3f}, {max(map(abs, self._ends)):.3f}]"
            text = f"{top} is above {bottom} {over}, by {size} on average"
        else:
            text = (
                f"Neither of {one} and {other} is above the other on average {over}: {one} minus {other} is {self.mean}"
            )
        return f"{text}; KL by KL {where or 'neither is above beyond the noise anywhere'}."

    @property
    def _ends(self) -> tuple[float, float]:
        assert self.mean is not None
        return self.mean.low, self.mean.high


def _ranges(ranges: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{low:.2g}\N{EN DASH}{high:.2g}" if high > low else f"{low:.2g}" for low, high in ranges)


def best_within(
    kl: Float64[np.ndarray, "replicates points"],
    reward: Float64[np.ndarray, "replicates points"],
    grid: Float64[np.ndarray, " grid"],
) -> Float64[np.ndarray, "replicates grid"]:
    """The best reward of a point whose KL is at most that of the grid; -inf before the first point."""
    found = np.full((len(kl), len(grid)), -np.inf)
    for at, height in zip(kl.T, reward.T, strict=True):
        np.maximum(found, np.where(at[:, None] <= grid, height[:, None], -np.inf), out=found)
    return found


def _area(
    kl: Float64[np.ndarray, "replicates points"], gain: Float64[np.ndarray, "replicates points"], end: float
) -> Float64[np.ndarray, " replicates"]:
    """The integral from 0 to `end` of the best gain so far, at least 0: exact, since it is a staircase."""
    order = np.argsort(kl, axis=1)
    at = np.clip(np.take_along_axis(kl, order, axis=1), 0, end)
    height = np.maximum.accumulate(np.maximum(np.take_along_axis(gain, order, axis=1), 0), axis=1)
    areas: np.ndarray = (height * np.diff(at, axis=1, append=end)).sum(axis=1)
    return areas


def _draws(n: int, replicates: int, rng: np.random.Generator) -> Float64[np.ndarray, "replicates n"]:
    """Weights that sum to 1: first the sample as it is, then draws of n - 1 from it with replacement."""
    even = np.full((1, n), 1 / n)
    if n == 1:
        return np.repeat(even, replicates + 1, axis=0)
    return np.concatenate([even, rng.multinomial(n - 1, even[0], size=replicates) / (n - 1)])


def mean_over(values: Float64[np.ndarray, "seeds prompts"], *, replicates: int = 2000, seed: int = 0) -> Interval:
    """The mean over seeds and prompts, with a bootstrap over both."""
    rng = np.random.default_rng(seed)
    prompts, seeds = (_draws(n, replicates, rng) for n in reversed(values.shape))
    means = ((seeds @ values) * prompts).sum(axis=1)
    return Interval.of(float(means[0]), means[1:])


@dataclass(frozen=True)
class _Replicated:
    """Means of a method's points at one seed; row 0 is the sample itself."""

    reward: Float64[np.ndarray, "replicates points"]
    kl: Float64[np.ndarray, "replicates points"]
    start: Float64[np.ndarray, " replicates"]

    def area(self, end: float) -> Float64[np.ndarray, " replicates"]:
        return _area(self.kl, self.reward - self.start[:, None], end)

    def curve(self, grid: Float64[np.ndarray, " grid"]) -> Float64[np.ndarray, "replicates grid"]:
        curves: np.ndarray = np.maximum(best_within(self.kl, self.reward, grid), self.start[:, None])
        return curves

    @property
    def reach(self) -> float:
        """KL of the last point that is on the frontier; 0 if no point is better than the start."""
        best = self.reward[0].max()
        return float(self.kl[0][self.reward[0] == best].min()) if best > self.start[0] else 0.0


class Frontiers:
    """All methods' frontiers, with bootstrap replicates over prompts and seeds.

    Args:
        points: Of each method, by seed; a method may lack seeds.
        starts: Reward of the start at every seed, per test prompt.
        end: Where areas end; default: the largest KL that two methods have points at, means over seeds.
    """

    def __init__(
        self,
        points: Mapping[str, Mapping[int, Measured]],
        starts: Mapping[int, Float64[np.ndarray, " prompts"]],
        *,
        end: float | None = None,
        replicates: int = 2000,
        seed: int = 0,
    ) -> None:
        self._rng_seed, self._replicates = seed, replicates
        prompts = _draws(len(next(iter(starts.values()))), replicates, np.random.default_rng(seed))
        self._methods = {
            name: {
                seed: _Replicated(prompts @ one.reward.T, prompts @ one.kl.T, prompts @ starts[seed])
                for seed, one in by_seed.items()
            }
            for name, by_seed in points.items()
        }
        self.end = end or self._seen_of_two()

    def _seen_of_two(self) -> float:
        seen = sorted(
            float(np.mean([one.kl[0].max() for one in by_seed.values()])) for by_seed in self._methods.values()
        )
        return seen[-2:][0] or 1.0

    def _over_seeds(self, seeds: Sequence[int]) -> Float64[np.ndarray, "replicates seeds"]:
        # The same draws for every method and pair that has these seeds.
        return _draws(len(seeds), self._replicates, np.random.default_rng((self._rng_seed, len(seeds))))

    def areas(self) -> list[Area]:
        """One a method, the largest first."""
        found = []
        for name, by_seed in self._methods.items():
            weights = self._over_seeds(sorted(by_seed))
            each = [by_seed[seed] for seed in sorted(by_seed)]
            area = (weights * np.stack([one.area(self.end) for one in each], axis=1)).sum(axis=1)
            best = (weights * np.stack([one.reward.max(axis=1) for one in each], axis=1)).sum(axis=1)
            found.append(
                Area(
                    name,
                    len(each),
                    sum(one.kl.shape[1] for one in each),
                    Interval.of(float(area[0]), area[1:]),
                    Interval.of(float(best[0]), best[1:]),
                    float(np.mean([one.reach for one in each])),
                    self.end,
                )
            )
        return sorted(found, key=lambda one: -one.area.value)

    def curve(self, method: str, grid: Float64[np.ndarray, " grid"]) -> Float64[np.ndarray, " grid"]:
        """The frontier of a method, mean over its seeds."""
        mean: np.ndarray = np.mean([one.curve(grid)[0] for one in self._methods[method].values()], axis=0)
        return mean

    def difference(self, first: str, second: str) -> Difference:
        """Compare two frontiers at the seeds that both have."""
        seeds = sorted(self._methods[first].keys() & self._methods[second].keys())
        one, other = ([self._methods[name][seed] for seed in seeds] for name in (first, second))
        if not seeds:
            return Difference(first, second, None, None, None, (), ())
        start = max(float(m.kl[0].min()) for m in (*one, *other))
        # How far each was seen at every seed.
        last, other_last = (min(float(m.kl[0].max()) for m in some) for some in (one, other))
        if start >= max(last, other_last):
            return Difference(first, second, None, None, None, (), ())
        weights, grid = self._over_seeds(seeds), np.linspace(start, max(last, other_last), _GRID)
        curves = np.zeros((len(weights), len(grid)))
        for weight, a, b in zip(weights.T, one, other, strict=True):
            curves += weight[:, None] * (a.curve(grid) - b.curve(grid))
        signs = _signs(curves)
        above, below = _runs(grid, (signs > 0) & (grid <= other_last)), _runs(grid, (signs < 0) & (grid <= last))
        end = min(last, other_last)
        if start >= end:
            return Difference(first, second, None, None, None, above, below)
        means = np.zeros(len(weights))
        for weight, a, b in zip(weights.T, one, other, strict=True):
            means += weight * ((a.area(end) - a.area(start)) - (b.area(end) - b.area(start))) / (end - start)
        return Difference(first, second, start, end, Interval.of(float(means[0]), means[1:]), above, below)


def _signs(curves: Float64[np.ndarray, "replicates grid"]) -> Float64[np.ndarray, " grid"]:
    """1 where row 0 is above 0, -1 where it is below, beyond a band that covers the whole grid 95 times in 100; else 0.

    The band is +-c standard errors, c the 95th percentile of the replicates' largest deviation in these units.
    """
    centre, error = curves[0], curves[1:].std(axis=0, ddof=1)
    noisy = error > _NOTHING  # elsewhere the two differ by the same in every replicate
    reach = np.zeros_like(centre)
    if noisy.any():
        deviations = np.abs(curves[1:, noisy] - centre[noisy]) / error[noisy]
        reach = np.percentile(deviations.max(axis=1), 95) * error
    signs: np.ndarray = np.sign(centre) * (np.abs(centre) > reach + _NOTHING)
    return signs


def _runs(grid: Float64[np.ndarray, " grid"], where: Bool[np.ndarray, " grid"]) -> tuple[tuple[float, float], ...]:
    """First and last KL of every run of neighbouring places."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(np.int8)))
    return tuple((float(grid[a]), float(grid[b - 1])) for a, b in zip(edges[0::2], edges[1::2], strict=True))
