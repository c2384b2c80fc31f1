"""Frontiers, areas and what is said of two of them, against numbers worked by hand."""

import numpy as np
import pytest

from prefopt.config import FrontierConfig
from prefopt.evaluate.frontier import Difference, Frontiers, Interval, Measured, best_within
from prefopt.evaluate.points import Point
from prefopt.report.frontier import FrontierReport


def measured(*points: tuple[float, float], prompts: int = 40, noise: float = 0.0, seed: int = 0) -> Measured:
    """Points (KL, reward), alike for every prompt but for a noise that sums to 0."""
    rng = np.random.default_rng(seed)
    spread = noise * rng.standard_normal((len(points), prompts))
    spread -= spread.mean(axis=1, keepdims=True)
    flat = np.ones((len(points), prompts))
    kl, reward = np.array(points).T
    return Measured(reward[:, None] * flat + spread, kl[:, None] * flat)


def start(prompts: int = 40, reward: float = 0.0) -> np.ndarray:
    return np.full(prompts, reward)


def test_the_frontier_is_the_best_reward_so_far() -> None:
    kl, reward = np.array([[2.0, 1.0, 3.0]]), np.array([[0.5, 0.2, 0.4]])
    found = best_within(kl, reward, np.array([0.5, 1.0, 1.9, 2.0, 9.0]))
    # Nothing before KL 1; then 0.2; from 2 on 0.5, which the worse point at 3 does not change.
    assert found.tolist() == [[-np.inf, 0.2, 0.2, 0.5, 0.5]]


def test_area_of_a_staircase_above_the_start() -> None:
    points = {"A": {0: measured((1, 0.3), (3, 0.6), (2, 0.1))}, "B": {0: measured((4, 0.2), (0.5, -0.5))}}
    found = Frontiers(points, {0: start(reward=0.1)})
    # A's points end at KL 3, B's at 4: the range is 0 to 3, where both have been seen.
    assert found.end == pytest.approx(3.0)
    a, b = found.areas()
    # A gains 0.2 from KL 1 to 3: 0.4; its point at 3 has no width. B has gained nothing before KL 4.
    assert (a.method, b.method) == ("A", "B")
    assert a.area.value == pytest.approx(0.4) and b.area.value == 0.0
    assert (a.reach, b.reach) == pytest.approx((3.0, 4.0)) and (a.points, b.points) == (3, 2)
    assert a.best.value == pytest.approx(0.6)
    # To KL 5: 0.4 + 2 * 0.5 = 1.4 for A, which keeps its last value; 1 * 0.1 for B.
    a, b = Frontiers(points, {0: start(reward=0.1)}, end=5.0).areas()
    assert a.area.value == pytest.approx(1.4) and b.area.value == pytest.approx(0.1)


def test_seeds_are_averaged() -> None:
    points = {"A": {0: measured((1, 1.0)), 1: measured((1, 2.0)), 2: measured((1, 6.0))}}
    (area,) = Frontiers(points, dict.fromkeys(range(3), start()), end=2.0).areas()
    assert area.area.value == pytest.approx(3.0)  # (1 + 2 + 6) / 3, one nat wide
    # s^2 = ((1-3)^2 + (2-3)^2 + (6-3)^2) / 2 = 7; the mean's standard error is sqrt(7 / 3) = 1.5275.
    error = (area.area.high - area.area.value) / 1.96
    assert error == pytest.approx(1.5275, rel=0.05)


def test_the_interval_over_prompts_is_that_of_a_mean() -> None:
    reward = np.random.default_rng(1).normal(0.5, 1.0, (1, 200))
    points = {"A": {0: Measured(reward, np.ones((1, 200)))}}
    (area,) = Frontiers(points, {0: np.zeros(200)}, end=2.0).areas()
    error = float(reward.std(ddof=1)) / np.sqrt(200)
    assert (area.area.high - area.area.value) / 1.96 == pytest.approx(error, rel=0.06)


def test_a_gain_that_all_prompts_share_with_the_start_has_no_noise() -> None:
    before = np.random.default_rng(0).normal(size=50)
    points = {"A": {0: Measured(before[None] + 0.25, np.ones((1, 50)))}}
    (area,) = Frontiers(points, {0: before}, end=2.0).areas()
    assert area.area.value == pytest.approx(0.25)
    assert area.area.high - area.area.low == pytest.approx(0.0, abs=1e-9)


def test_frontiers_that_cross() -> None:
    points = {
        "A": {0: measured((0.5, 0.1), (1, 0.4), (9, 0.4), noise=0.1)},
        "B": {0: measured((1, 0.2), (5, 0.6), (10, 0.6), noise=0.1, seed=1)},
    }
    found = Frontiers(points, {0: start()}).difference("A", "B")
    # Both have points from KL 1 to 9; A is 0.2 above as far as KL 5, and 0.2 below from there: 0 on average.
    assert (found.start, found.end) == pytest.approx((1.0, 9.0))
    assert found.mean is not None and found.mean.value == pytest.approx(0.0)
    assert np.array(found.above) == pytest.approx(np.array([[1.0, 5.0]]), abs=0.05)
    assert np.array(found.below) == pytest.approx(np.array([[5.0, 9.0]]), abs=0.05)
    assert found.sentence.startswith("Neither of A and B is above the other on average over KL 1\N{EN DASH}9")
    assert found.sentence.endswith("A is above at KL 1\N{EN DASH}5 and B is above at KL 5\N{EN DASH}9.")


def test_a_clear_difference_is_said_with_its_size_and_place() -> None:
    points = {
        "A": {0: measured((1, 0.2), (3, 0.9), (8, 0.9), noise=0.1)},
        "B": {0: measured((1, 0.2), (8, 0.3), noise=0.1, seed=1)},
    }
    found = Frontiers(points, {0: start()}).difference("A", "B")
    assert found.mean is not None
    # A minus B is 0 from KL 1 to 3 and 0.7 from 3 to 8: 0.7 * 5 / 7 = 0.5.
    assert found.mean.value == pytest.approx(0.5)
    ((low, high),) = found.above
    assert low == pytest.approx(3.0, abs=0.05) and high == pytest.approx(8.0, abs=0.05)
    assert found.sentence.startswith("A is above B over KL 1\N{EN DASH}8, where both have points, by 0.500 [0.4")
    assert found.sentence.endswith("KL by KL A is above at KL 3\N{EN DASH}8.")
    turned = Frontiers(points, {0: start()}).difference("B", "A")
    assert turned.mean is not None and turned.mean.value == pytest.approx(-0.5)
    assert turned.below == found.above
    assert turned.sentence.startswith("A is above B over KL 1")


def test_noise_is_not_a_difference() -> None:
    points = {
        "A": {s: measured((1, 0.2), (8, 0.30), noise=2.0, seed=s) for s in range(3)},
        "B": {s: measured((1, 0.2), (8, 0.25), noise=2.0, seed=9 + s) for s in range(3)},
    }
    found = Frontiers(points, dict.fromkeys(range(3), start())).difference("A", "B")
    assert found.mean is not None and not found.mean.beyond_noise
    assert found.above == found.below == ()
    assert "neither is above beyond the noise anywhere" in found.sentence


@pytest.mark.parametrize(
    "other", [{0: measured((3, 0.9), (4, 0.9))}, {1: measured((1, 0.9), (4, 0.9))}], ids=["no KL", "no seed"]
)
def test_nothing_is_claimed_where_only_one_method_has_points(other: dict[int, Measured]) -> None:
    points = {"A": {0: measured((1, 0.2), (2, 0.3))}, "B": other}
    found = Frontiers(points, {0: start(), 1: start()}).difference("A", "B")
    assert found == Difference("A", "B", None, None, None, (), ())
    assert found.sentence == "A and B have no range of KL in common: not compared."


def test_more_reward_with_less_kl_is_above() -> None:
    points = {"A": {0: measured((1, 0.9), (2, 0.9))}, "B": {0: measured((3, 0.2), (4, 0.3))}}
    found = Frontiers(points, {0: start()}).difference("A", "B")
    # A was never seen at KL 3 to 4, but what it reached at KL 1 is more than what B has there.
    assert found.mean is None and not found.below
    assert np.array(found.above) == pytest.approx(np.array([[3.0, 4.0]]), abs=0.01)
    assert found.sentence == ("A and B have no range of KL in common, but with less KL A is above at KL 3\N{EN DASH}4.")


def test_only_seeds_that_both_have_are_compared() -> None:
    points = {
        "A": {0: measured((1, 0.5), (4, 0.5)), 1: measured((1, 9.0), (4, 9.0))},
        "B": {0: measured((1, 0.2), (4, 0.2))},
    }
    found = Frontiers(points, {0: start(), 1: start()}).difference("A", "B")
    assert found.mean is not None and found.mean.value == pytest.approx(0.3)


def test_a_method_that_gains_nothing_has_no_area() -> None:
    (area,) = Frontiers({"A": {0: measured((2, -0.5))}}, {0: start()}).areas()
    assert (area.area.value, area.reach) == (0.0, 0.0) and area.end == pytest.approx(2.0)


def test_an_interval_speaks() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert Interval(0.5, 0.25, 0.75).beyond_noise and not Interval(0.1, -0.1, 0.3).beyond_noise


def test_last_checkpoints_are_one_row_whatever_their_step() -> None:
    """Seeds have rows of their own, so their runs need not end at the same step."""

    def point(method: str, seed: int, step: int, reward: float, kl: float) -> Point:
        setting = "" if method == "start" else "beta 1"
        key = f"{method}{seed}{step}"
        return Point(key, method, setting, seed, step, "r", start(reward=reward), start(reward=kl), tokens=9.0)

    points = [point("start", seed, 0, 0.0, 0.0) for seed in (0, 1)]
    points += [point("DPO", 0, 10, 0.1, 1.0), point("DPO", 0, 24, 0.3, 2.0)]
    points += [point("DPO", 1, 10, 0.2, 1.0), point("DPO", 1, 22, 0.5, 4.0)]
    config = FrontierConfig.model_validate(
        {
            **{"out": "runs/x", "model": "m", "reward": "length:3", "seeds": [0, 1]},
            **{"prompts": {"data": "p", "train": 2, "test": 2}, "pairs": {"data": "d"}},
            "methods": [{"name": "DPO", "recipe": "dpo", "sweep": {"beta": [1.0]}}],
        }
    )
    table = FrontierReport(config, points).markdown()
    (row,) = [line for line in table.splitlines() if line.startswith("| DPO | beta 1")]
    # 0.3 and 0.5, at KL 2 and 4: 0.4 at 3.
    assert row.startswith("| DPO | beta 1 | 2 | 22\N{EN DASH}24 | 0.400 [") and " | 3.000 [" in row
