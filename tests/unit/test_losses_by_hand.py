"""One pair, worked by hand under every objective.

The pair: log pi(y_w) = -10 against -12 under the reference, log pi(y_l) = -9 against -8; so the log-ratios
are a = +2 and b = -1 and differ by 3. Chosen has 4 tokens, rejected 2: per token +0.5 and -0.5. With
beta = 0.5 the rewards are 1 and -0.5, the margin 1.5.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefopt import losses
from prefopt.losses import LossTotal

PAIR = {
    "policy_chosen": torch.tensor([-10.0], dtype=torch.float64),
    "policy_rejected": torch.tensor([-9.0], dtype=torch.float64),
    "reference_chosen": torch.tensor([-12.0], dtype=torch.float64),
    "reference_rejected": torch.tensor([-8.0], dtype=torch.float64),
    "chosen_tokens": torch.tensor([4]),
    "rejected_tokens": torch.tensor([2]),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


def probability(p: float) -> torch.Tensor:
    return torch.tensor([p], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        (losses.dpo, {"beta": 0.5}, nls(1.5)),
        (losses.dpo, {"beta": 0.5, "label_smoothing": 0.1}, 0.9 * nls(1.5) + 0.1 * nls(-1.5)),
        # A judge of 0.75, of whose labels 0.1 are flipped: 0.1 + 0.8 * 0.75 = 0.7.
        (
            losses.dpo,
            {"beta": 0.5, "label_smoothing": 0.1, "soft_labels": probability(0.75)},
            0.7 * nls(1.5) + 0.3 * nls(-1.5),
        ),
        (losses.robust_dpo, {"beta": 0.5, "label_smoothing": 0.1}, (0.9 * nls(1.5) - 0.1 * nls(-1.5)) / 0.8),
        # h = 0.5 - -0.5 = 1; target 1 / (2 * 0.25) = 2: (1 - 2)^2.
        (losses.ipo, {"beta": 0.25}, 1.0),
        # With probability 1/4 the target is -2: 0.75 * (1 - 2)^2 + 0.25 * (1 + 2)^2.
        (losses.ipo, {"beta": 0.25, "soft_labels": probability(0.75)}, 3.0),
        # h = 3; target 2: (3 - 2)^2.
        (losses.ipo_sum, {"beta": 0.25}, 1.0),
        # Target 1 / (2 * 0.1) = 5: (3 - 5)^2.
        (losses.ipo_sum, {"beta": 0.1}, 4.0),
        # m = 0.2 * 3 = 0.6: 1 - 0.6; with beta 0.5 the margin 1.5 is enough.
        (losses.hinge, {"beta": 0.2}, 0.4),
        (losses.hinge, {"beta": 0.5}, 0.0),
        # q log(q / 0.9) + (1 - q) log((1 - q) / 0.1), q = sigmoid(1.5).
        (
            losses.exo,
            {"beta": 0.5, "label_smoothing": 0.1},
            sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
        ),
        # s = sigmoid(1.5 / 0.5).
        (
            losses.discopop,
            {"beta": 0.5, "tau": 0.5},
            sigmoid(-3.0) * nls(1.5) + sigmoid(3.0) * math.exp(-1.5),
        ),
        (losses.nca, {"beta": 0.5}, nls(1.0) + 0.5 * nls(-1.0) + 0.5 * nls(0.5)),
        (
            losses.nca,
            {"beta": 0.5, "soft_labels": probability(0.75)},
            0.75 * nls(1.0) + 0.25 * nls(-0.5) + 0.5 * nls(-1.0) + 0.5 * nls(0.5),
        ),
        # Rewards less 0.25: 0.75 and -0.75.
        (losses.bco_pair, {"beta": 0.5, "reward_shift": 0.25}, 2 * nls(0.75)),
        (losses.bco_pair, {"beta": 0.5, "reward_shift": torch.tensor(0.25).double()}, 2 * nls(0.75)),
        # Targets 1 and -1: (2 - 1)^2 + (-1 + 1)^2.
        (losses.sppo_hard, {"beta": 0.5}, 1.0),
        # Targets (0.75 - 0.5) / 0.5 = 0.5 and (0.25 - 0.5) / 0.5 = -0.5: 1.5^2 + 0.5^2.
        (
            losses.sppo_soft,
            {"beta": 0.5, "chosen_wins": probability(0.75), "rejected_wins": probability(0.25)},
            2.5,
        ),
        (losses.apo_zero, {"beta": 0.5}, sigmoid(-0.5) - sigmoid(1.0)),
        (losses.apo_down, {"beta": 0.5}, sigmoid(1.0) - sigmoid(1.5)),
        # One pair: u = -10 + 9 = -1, v = -12 + 8 = -4.
        (losses.aot, {"beta": 0.5}, nls(1.5)),
        (losses.aot_unpaired, {"beta": 0.5, "label_smoothing": 0.1}, 0.9 * nls(1.5) + 0.1 * nls(-1.5)),
        # 5 * 0.5 - 5 * -0.5 = 5.
        (losses.length_normalized_dpo, {"beta": 5.0}, nls(5.0)),
        # 1 + 0.2 * 4 = 1.8 and -0.5 + 0.2 * 2 = -0.1: two tokens more explain 0.4 of the margin.
        (losses.r_dpo, {"beta": 0.5, "alpha": 0.2}, nls(1.9)),
        (losses.f_dpo, {"beta": 0.5, "divergence": "reverse_kl"}, nls(1.5)),
        # 0.5 * ((1 - e^-2) - (1 - e^1)).
        (losses.f_dpo, {"beta": 0.5, "divergence": "forward_kl"}, nls(0.5 * (math.e - math.exp(-2)))),
        # u = e^2 and e^-1: log(2u / (1 + u)).
        (
            losses.f_dpo,
            {"beta": 0.5, "divergence": "jensen_shannon"},
            nls(0.5 * (math.log(math.exp(2) / (1 + math.exp(2))) - math.log(math.exp(-1) / (1 + math.exp(-1))))),
        ),
        # u^-0.25 = e^-0.5 and e^0.25; divided by 0.25.
        (
            losses.f_dpo,
            {"beta": 0.5, "divergence": "alpha", "alpha": 0.25},
            nls(0.5 * (math.exp(0.25) - math.exp(-0.5)) / 0.25),
        ),
    ],
)
def test_one_pair_by_hand(loss: Callable[..., LossTotal], options: dict[str, Any], expected: float) -> None:
    wanted = inspect.signature(loss).parameters
    total = loss(**{name: value for name, value in PAIR.items() if name in wanted}, **options)
    assert total.losses.item() == pytest.approx(expected, abs=1e-12)
    assert total.count == 1
    assert total.metrics["rewards/accuracies"].item() == 1.0
    assert total.metrics["logps/chosen"].item() == -10.0


def test_length_desensitised_by_hand() -> None:
    # Heads of 2 tokens: log-ratios 1.5 and -1; chosen's tail of 2 more: 0.5, of which alpha = 0.4 counts.
    # Rewards 0.5 * (1.5 + 0.4 * 0.5) = 0.85 and -0.5.
    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    total = losses.ld_dpo(
        policy_chosen_head=one(-5.5),
        policy_chosen_tail=one(-4.5),
        policy_rejected_head=one(-9.0),
        policy_rejected_tail=one(0.0),
        reference_chosen_head=one(-7.0),
        reference_chosen_tail=one(-5.0),
        reference_rejected_head=one(-8.0),
        reference_rejected_tail=one(0.0),
        beta=0.5,
        alpha=0.4,
    )
    assert total.losses.item() == pytest.approx(nls(1.35))
    assert total.metrics["logps/chosen"].item() == -10.0


def test_sorted_distributions_by_hand() -> None:
    # u = (3, 0) -> (0, 3); v = (1, 2) -> (1, 2): differences -1 and 1, where row by row they were 2 and -2.
    zero = torch.zeros(2, dtype=torch.float64)
    policy, reference = torch.tensor([3.0, 0.0]).double(), torch.tensor([1.0, 2.0]).double()
    total = losses.aot(
        policy_chosen=policy, policy_rejected=zero, reference_chosen=reference, reference_rejected=zero, beta=1.0
    )
    assert total.losses.tolist() == pytest.approx([nls(-1.0), nls(1.0)])
    assert total.metrics["rewards/margins"].tolist() == [2.0, -2.0]
    # Chosen rewards (3, 0) -> (0, 3), rejected (1, 2): again -1 and 1.
    unpaired = losses.aot_unpaired(
        policy_chosen=policy, policy_rejected=reference, reference_chosen=zero, reference_rejected=zero, beta=1.0
    )
    assert unpaired.losses.tolist() == pytest.approx([nls(-1.0), nls(1.0)])


def test_dead_zones_are_left_with_a_gradient() -> None:
    # 1/u overflows float32 beyond log u = -88; the tangent at -40 still pulls, by beta * e^40 at most.
    policy = torch.tensor([-200.0], requires_grad=True)
    zero = torch.zeros(1)
    total = losses.f_dpo(
        policy_chosen=policy, policy_rejected=zero, reference_chosen=zero, reference_rejected=zero, beta=0.1,
        divergence="forward_kl",
    )  # fmt: skip
    total.losses.sum().backward()
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(-0.1 * math.exp(40), rel=1e-5)
