"""Best-of-N: the exact expectation over subsets, by hand and by brute force, and the command."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from prefopt.cli import main
from prefopt.evaluate.best_of import best_of_points, expected_best, kl_bound
from tiny import save_tiny_model


def array(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def test_by_hand() -> None:
    # Of {1, 3, 2} the pairs are {1, 3}, {1, 2}, {3, 2}: bests 3, 2, 3. Values 10 -> 1, 30 -> 3, 20 -> 2.
    chosen_by, valued = array([1, 3, 2]), array([10, 30, 20])
    assert expected_best(chosen_by, chosen_by, 2).tolist() == [pytest.approx(8 / 3)]
    assert expected_best(chosen_by, valued, 2).tolist() == [pytest.approx((30 + 20 + 30) / 3)]
    assert expected_best(chosen_by, valued, 1).tolist() == [pytest.approx(20)]
    assert expected_best(chosen_by, valued, 3).tolist() == [pytest.approx(30)]


def test_ties_by_hand() -> None:
    # Scores 1, 1, 0: the pairs are {1, 1} (either: (10 + 40) / 2), {first 1, 0} (10), {second 1, 0} (40).
    assert expected_best(array([1, 1, 0]), array([10, 40, 7]), 2).tolist() == [pytest.approx((25 + 10 + 40) / 3)]
    # All tie: the mean, whatever N.
    assert expected_best(array([2, 2, 2, 2]), array([1, 2, 3, 6]), 3).tolist() == [pytest.approx(3)]


def brute_force(scores: np.ndarray, values: np.ndarray, n: int) -> float:
    found = []
    for subset in combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        tied = [values[i] for i in subset if scores[i] == best]
        found.append(sum(tied) / len(tied))
    return float(np.mean(found))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9])
def test_every_subset_by_brute_force(n: int) -> None:
    rng = np.random.default_rng(n)
    chosen_by = rng.integers(0, 5, (4, 9)).astype(np.float64)  # many ties
    chosen_by[0] = rng.permutation(9)  # and none
    valued = rng.normal(size=(4, 9))
    wanted = [brute_force(c, v, n) for c, v in zip(chosen_by, valued, strict=True)]
    np.testing.assert_allclose(expected_best(chosen_by, valued, n), wanted, rtol=1e-12)


def test_the_mean_of_many_samples_does_not_overflow() -> None:
    # Uniform scores: the best of N of 0..M-1 is N (M + 1) / (N + 1) - 1 on average.
    found = expected_best(array(list(range(2000))), array(list(range(2000))), 1000)
    assert found.tolist() == [pytest.approx(1000 * 2001 / 1001 - 1)]


def test_the_bound_by_hand() -> None:
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(1.3863 - 0.75, abs=1e-4)
    assert kl_bound(64) == pytest.approx(4.1589 - 0.9844, abs=1e-4)


def test_the_bound_holds_where_the_kl_is_known() -> None:
    # One token of three, scores 1 < 2 < 3: the best of N has P(at most k) = F(k)^N.
    p = np.array([0.5, 0.3, 0.2])
    for n in (2, 4, 16):
        best = np.diff(np.r_[0, np.cumsum(p) ** n])
        assert 0 < float((best * np.log(best / p)).sum()) < kl_bound(n)


def test_points_are_in_order_and_each_n_once() -> None:
    points = best_of_points(array([1, 3, 2], [0, 0, 1]), array([10, 30, 20], [1, 2, 3]), [3, 1, 3])
    assert [p.n for p in points] == [1, 3]
    assert [p.kl_bound for p in points] == [0, pytest.approx(math.log(3) - 2 / 3)]
    assert points[1].reward.tolist() == [3, 1] and points[1].true_reward.tolist() == [30, 3]


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("best-of")
    save_tiny_model(path / "tiny")
    rows = [{"prompt": p, "chosen": c, "rejected": "n"} for p in ("How is x?", "Who?", "A") for c in ("a", "b")]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def best_of(folder: Path, *arguments: str) -> int:
    given = ["--model", str(folder / "tiny"), "--prompts", str(folder / "pairs.jsonl"), "--max-new-tokens", "6"]
    return main(["evaluate", "best-of", *given, "--reward", "regex:[a-e]", "--out", str(folder / "o.json"), *arguments])


def test_the_command_writes_every_n(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert best_of(folder, "--n", "4", "1", "8", "--true-reward", "length:2", "--seed", "3", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found == json.loads((folder / "o.json").read_text())
    assert "6 read: 3 kept, 3 mended (3 prompt_repeated); 3 prompts" in err and "samples: 3/3 prompts" in err
    assert (found["samples"], found["prompts_used"], found["reward"]) == (8, 3, "regex:[a-e]")
    assert [p["n"] for p in found["points"]] == [1, 4, 8]
    means = [p["reward"]["mean"] for p in found["points"]]
    assert 0 < means[0] < means[1] < means[2] <= 1
    for point in found["points"]:
        for name in ("reward", "true_reward"):
            assert point[name]["low"] <= point[name]["mean"] <= point[name]["high"]


def test_the_command_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert best_of(folder, "--n", "2", "--samples", "4") == 0
    out = capsys.readouterr().out
    assert "KL at most, nats" in out and "true reward" not in out and "0.193" in out  # log 2 - 1/2
    assert "Means over 3 prompts" in out
    assert json.loads((folder / "o.json").read_text())["points"][0]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "what", "more"),
    [
        (["--n", "4", "0"], "n[1] is not right.", "greater than or equal to 1"),
        (["--n", "4", "--samples", "3"], "samples must be at least 4, the most of n.", "flag --samples"),
        (["--n", "4", "--temperature", "0"], "temperature is not right.", "greater than 0"),
        (["--n", "4", "--true-reward", "nowhere:f"], "There is no module 'nowhere'.", "reward nowhere:f"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    arguments: list[str], what: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", "m", "--prompts", "p", "--reward", "length:3", "--out", str(tmp_path / "o.json")]
    assert main(["evaluate", "best-of", *given, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {what}\n") and more in err
    assert not (tmp_path / "o.json").exists()


def test_a_file_without_a_prompt_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "none.jsonl"
    file.write_text('{"text": "a"}\n')
    given = ["--model", "m", "--prompts", str(file), "--reward", "length:3", "--n", "2", "--out", str(tmp_path / "o")]
    assert main(["evaluate", "best-of", *given]) == 2
    assert f"error: No usable row is left.\n  where:    {file}\n" in capsys.readouterr().err
