"""Each warning on a hand-made course of metrics: said once, with what to do, and not on a healthy course."""

import math
from collections.abc import Iterable

import pytest

from prefopt.train.health import Health, HealthWarning

Line = tuple[int, str, dict[str, float]]

LENGTHS = {"lengths/chosen": 100.0, "lengths/rejected": 100.0}


def told(health: Health, lines: Iterable[Line]) -> list[HealthWarning]:
    return [warning for line in lines for warning in health.observe(*line)]


def kinds(health: Health, lines: Iterable[Line]) -> list[tuple[str, int]]:
    return [(warning.kind, warning.step) for warning in told(health, lines)]


def train(step: int, **metrics: float) -> Line:
    return step, "train", {name.replace("_", "/", 1): value for name, value in metrics.items()}


def held_out(step: int, **metrics: float) -> Line:
    return step, "eval", {name.replace("_", "/", 1): value for name, value in metrics.items()}


def healthy_dpo() -> list[Line]:
    """Rewards part, accuracy rises on both sides, KL and lengths move a little."""
    lines: list[Line] = []
    for step in range(41):
        done = step / 40
        rewards = {"rewards/chosen": 0.4 * done, "rewards/rejected": -0.8 * done, "rewards/margins": 1.2 * done}
        shared = {"loss": math.log(2) - 0.3 * done, **rewards, **LENGTHS}
        if step % 10 == 0:
            more = {"kl": 6 * done, "lengths/sampled": 80 + 20 * done, "pairs": 50.0}
            lines.append((step, "eval", {**shared, "rewards/accuracies": 0.5 + 0.2 * done, **more}))
        lines.append((step, "train", {**shared, "rewards/accuracies": 0.5 + 0.3 * done}))
    return lines


def test_nothing_is_said_of_a_healthy_run() -> None:
    assert told(Health(beta=0.1), healthy_dpo()) == []
    sft = [line for k in range(30) for line in (held_out(k, loss=2 - k / 30), train(k, loss=2 - k / 25))]
    assert told(Health(), sft) == []


def test_missing_metrics_are_not_judged() -> None:
    bare = [line for k in range(20) for line in (held_out(k, pairs=4), train(k, grad_norm=1.0))]
    assert told(Health(beta=0.1), bare) == []
    assert told(Health(), [held_out(0), train(0)]) == []


def test_a_first_loss_that_is_not_ln_2() -> None:
    # -log sigmoid(0.2) = 0.5981
    off = {"loss": 0.5981, "rewards_chosen": 0.3, "rewards_rejected": 0.1}
    (warning,) = told(Health(beta=0.1), [held_out(0, **off), train(0, **off)])
    assert (warning.kind, warning.step) == ("step0_loss", 0)
    assert "0.5981" in warning.sentence and "--reference" in warning.sentence
    assert told(Health(beta=0.1), [train(0, loss=0.7), train(1, loss=0.4)]) == []  # rounding; later steps may differ
    assert told(Health(), [held_out(0, loss=2.3)]) == []  # sft has no such number


def test_pair_weights_move_the_first_loss_and_are_no_mistake() -> None:
    halves = {"loss": 0.5 * math.log(2), "rewards_chosen": 0.0, "rewards_rejected": 0.0}
    assert told(Health(beta=0.1), [held_out(0, **halves), train(0, **halves)]) == []


def falling(chosen: float, rejected: float, start: float = 0.0) -> list[Line]:
    """Rewards reach their values at step 1 and stay."""
    lines = [(0, "train", {"rewards/chosen": start, "rewards/rejected": start, **LENGTHS})]
    later = {"rewards/chosen": start + chosen, "rewards/rejected": start + rejected, **LENGTHS}
    return lines + [(step, "train", later) for step in range(1, 30)]


def test_both_log_probabilities_falling() -> None:
    # beta 0.1, 100 tokens: a reward of -0.8 is 8 nats, 0.08 a token; -1.6 is 0.16. The average over 8
    # steps is full at step 7, still with the zero of step 0 in it: 7/8 of the fall.
    health = Health(beta=0.1)
    (warning,) = told(health, falling(-0.8, -1.6))
    assert (warning.kind, warning.step) == ("likelihood_displacement", 7)
    assert "0.07 and 0.14 nats" in warning.sentence and "common" in warning.sentence and "--beta" in warning.sentence


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (0.2, -3.0),  # as it should be: only the rejected ones fall
        (-3.0, 0.2),
        (-0.4, -3.0),  # the chosen ones by 0.04 nats a token: too little
    ],
)
def test_one_side_falling_is_no_displacement(chosen: float, rejected: float) -> None:
    assert told(Health(beta=0.1), falling(chosen, rejected)) == []


def test_displacement_counts_from_where_the_policy_started() -> None:
    """With a reference of its own the rewards begin far below zero."""
    assert told(Health(beta=0.1), falling(-0.1, -0.4, start=-5.0)) == []
    assert kinds(Health(beta=0.1), falling(-0.8, -1.6, start=5.0)) == [("likelihood_displacement", 7)]


def accuracies(train_accuracy: float, held: list[float], losses: list[float], pairs: float) -> list[Line]:
    lines: list[Line] = []
    for number, (accuracy, loss) in enumerate(zip(held, losses, strict=True)):
        lines.append((8 * number, "eval", {"rewards/accuracies": accuracy, "loss": loss, "pairs": pairs}))
        lines += [train(8 * number + k, rewards_accuracies=train_accuracy) for k in range(8)]
    return lines


def test_perfect_on_training_pairs_and_falling_on_held_out_ones() -> None:
    course = accuracies(1.0, [0.5, 0.70, 0.68, 0.66, 0.60], [0.5] * 5, pairs=100)
    (warning,) = told(Health(), course)
    assert (warning.kind, warning.step) == ("overfit", 24)  # 0.70 - 0.66 is the first fall by more than 0.03
    assert "100%" in warning.sentence and "from 70% to 66%" in warning.sentence and "epochs" in warning.sentence


def test_perfect_on_training_pairs_and_a_rising_held_out_loss() -> None:
    course = accuracies(1.0, [0.7] * 4, [0.69, 0.50, 0.505, 0.52], pairs=100)
    (warning,) = told(Health(), course)
    assert (warning.kind, warning.step) == ("overfit", 24)  # 2% above 0.50 is 0.51
    assert "from 0.500 to 0.520" in warning.sentence


def test_one_pair_lost_in_a_small_held_out_set_is_chance() -> None:
    assert told(Health(), accuracies(1.0, [0.75, 0.70, 0.70], [0.5] * 3, pairs=20)) == []
    assert kinds(Health(), accuracies(1.0, [0.75, 0.65], [0.5] * 2, pairs=20)) == [("overfit", 8)]


def test_held_out_accuracy_falling_alone_is_not_overfitting() -> None:
    assert told(Health(), accuracies(0.9, [0.7, 0.5], [0.5, 0.6], pairs=100)) == []


def losses(train_losses: list[float], held: list[float]) -> list[Line]:
    lines: list[Line] = []
    for number, (mine, theirs) in enumerate(zip(train_losses, held, strict=True)):
        lines += [held_out(8 * number, loss=theirs)]
        lines += [train(8 * number + k, loss=mine) for k in range(8)]
    return lines


def test_sft_that_learns_rows_by_heart() -> None:
    (warning,) = told(Health(), losses([2.0, 1.5, 1.0, 0.5, 0.2], [2.0, 1.6, 1.55, 1.57, 1.7]))
    assert (warning.kind, warning.step) == ("overfit", 32)
    assert "from 1.550 to 1.700" in warning.sentence


def test_sft_that_is_worse_from_the_first_evaluation_on() -> None:
    assert kinds(Health(), losses([2.0, 1.5, 1.0], [2.0, 2.0, 2.2])) == [("overfit", 16)]


def test_both_losses_rising_is_not_learning_by_heart() -> None:
    assert told(Health(), losses([2.0, 2.5, 3.5], [2.0, 2.4, 3.0])) == []


def test_kl_running_away() -> None:
    # mean length (80 + 120) / 2 = 100 tokens: 50 nats is the line.
    lengths = {"lengths_chosen": 80.0, "lengths_rejected": 120.0}
    course = [held_out(k, kl=kl, **lengths) for k, kl in enumerate([0.0, 30.0, 49.0, 60.0, 90.0])]
    (warning,) = told(Health(beta=0.1), course)
    assert (warning.kind, warning.step) == ("kl_runaway", 3)
    assert "60.0 nats" in warning.sentence and "0.60 a token" in warning.sentence and "--beta" in warning.sentence
    assert told(Health(beta=0.1), [held_out(0, kl=1000.0)]) == []  # of unknown length


def test_samples_growing_longer() -> None:
    course = [held_out(k, lengths_sampled=n) for k, n in enumerate([40.0, 50.0, 60.0, 61.0, 90.0])]
    (warning,) = told(Health(), course)
    assert (warning.kind, warning.step) == ("length_drift", 3)  # above 1.5 x 40
    assert "from 40 to 61 tokens" in warning.sentence


def test_many_rows_cut() -> None:
    health = Health()
    assert health.note_cut(0, 0) == []
    assert health.note_cut(5, 100) == []
    (warning,) = health.note_cut(6, 100)
    assert warning.kind == "many_cut"
    assert "6 of 100 rows (6%)" in warning.sentence and "--max-length" in warning.sentence
    assert health.note_cut(50, 100) == []  # once


def test_a_resumed_run_knows_what_came_before_and_repeats_nothing() -> None:
    lengths = [40.0, 70.0, 80.0]
    lines = [{"step": k, "split": "eval", "lengths/sampled": n} for k, n in enumerate(lengths)]
    whole = Health()
    whole.recall(lines[:1])
    assert kinds(whole, [held_out(1, lengths_sampled=70.0)]) == [("length_drift", 1)]
    said_before = Health()
    said_before.recall(lines[:2])
    assert told(said_before, [held_out(2, lengths_sampled=80.0)]) == []


def test_samples_that_are_not_the_trained_models() -> None:
    """The ratio at the first minibatch is 1; what rounding makes of it is not spoken of."""
    near = [train(k, **{"ratio_first": 1.0009, "ratio_sampled": 1.009, "reward": 1.0}) for k in range(3)]
    assert told(Health(), near) == []
    (warning,) = told(Health(), [train(0, ratio_first=1.0, ratio_sampled=1.02)])
    assert warning.kind == "first_ratio" and "up to 1.02 times" in warning.sentence
    assert told(Health(ratio_tolerance=3e-2), [train(0, ratio_first=1.02, ratio_sampled=1.2)]) == []
    (warning,) = told(Health(), [train(0, ratio_first=1.0), train(1, ratio_first=1.5), train(2, ratio_first=2.0)])
    assert (warning.kind, warning.step) == ("first_ratio", 1)
    assert "up to 1.5 times what they were drawn with" in warning.sentence


def test_ppo_is_told_of_its_own_settings() -> None:
    # 30 nats on samples of 40 tokens: 0.75 a token. From 40 to 70 tokens: more than half as long again.
    sampled = {"reward": 1.0, "lengths_sampled": 40.0}
    (warning,) = told(Health(), [held_out(0, kl=0.0, **sampled), held_out(1, kl=30.0, **sampled)])
    assert warning.kind == "kl_runaway" and "raise --kl-coef" in warning.sentence and "beta" not in warning.sentence
    (warning,) = told(Health(), [held_out(0, kl=0.0, **sampled), held_out(1, kl=1.0, reward=2.0, lengths_sampled=70.0)])
    assert warning.kind == "length_drift" and "beta" not in warning.sentence
