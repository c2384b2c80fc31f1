"""Hand-worked values, gradients in float64, extremes, and shapes that must not broadcast."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from prefopt.losses import dpo, negative_log_likelihood


def sums(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_by_hand() -> None:
    # chosen: 0.5 * (-10 - -12) = 1.0; rejected: 0.5 * (-9 - -8) = -0.5; margin 1.5.
    total = dpo(
        policy_chosen=sums(-10.0),
        policy_rejected=sums(-9.0),
        reference_chosen=sums(-12.0),
        reference_rejected=sums(-8.0),
        beta=0.5,
    )
    assert total.metrics["rewards/chosen"].item() == pytest.approx(1.0)
    assert total.metrics["rewards/rejected"].item() == pytest.approx(-0.5)
    assert total.metrics["rewards/margins"].item() == pytest.approx(1.5)
    assert total.metrics["rewards/accuracies"].item() == 1.0
    assert total.losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert total.metrics["importance_weight"].item() == pytest.approx(1 / (1 + math.exp(1.5)))
    assert total.count == 1


def test_equal_models_start_at_ln_2_and_a_tie_counts_half() -> None:
    same = sums(-3.0, -70.0)
    other = sums(-5.0, -1.0)
    total = dpo(policy_chosen=same, policy_rejected=other, reference_chosen=same, reference_rejected=other, beta=0.1)
    torch.testing.assert_close(total.losses, sums(math.log(2), math.log(2)))
    assert total.metrics["rewards/accuracies"].tolist() == [0.5, 0.5]


def test_conservative_dpo_by_hand_and_its_minimum() -> None:
    eps, margin = 0.1, 2.0
    total = dpo(
        policy_chosen=sums(margin),
        policy_rejected=sums(0.0),
        reference_chosen=sums(0.0),
        reference_rejected=sums(0.0),
        beta=1.0,
        label_smoothing=eps,
    )
    expected = 0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2))
    assert total.losses.item() == pytest.approx(expected)

    best = sums(math.log((1 - eps) / eps)).requires_grad_()
    zero = sums(0.0)
    at_best = dpo(
        policy_chosen=best, policy_rejected=zero, reference_chosen=zero, reference_rejected=zero, beta=1.0,
        label_smoothing=eps,
    )  # fmt: skip
    at_best.losses.sum().backward()
    assert best.grad is not None
    assert abs(best.grad.item()) < 1e-12


def test_gradient_signs_weight_and_factor() -> None:
    chosen, rejected = sums(-4.0, -4.0).requires_grad_(), sums(-4.0, -4.0).requires_grad_()
    total = dpo(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=sums(-4.0, -4.0),
        reference_rejected=sums(-4.0, -4.0),
        beta=0.2,
        weights=sums(1.0, 0.5),
    )
    total.losses.sum().backward()
    # d loss / d log pi(chosen) = -beta * sigmoid(-margin) * weight = -0.2 * 0.5 * weight.
    assert chosen.grad is not None and rejected.grad is not None
    torch.testing.assert_close(chosen.grad, sums(-0.1, -0.05))
    torch.testing.assert_close(rejected.grad, sums(0.1, 0.05))
    assert total.count == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradients_against_finite_differences(smoothing: float) -> None:
    inputs = [torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(2)]
    fixed = [torch.randn(5, dtype=torch.float64) for _ in range(2)]

    def loss(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return dpo(
            policy_chosen=c,
            policy_rejected=r,
            reference_chosen=fixed[0],
            reference_rejected=fixed[1],
            beta=0.7,
            label_smoothing=smoothing,
        ).losses

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extremes_stay_finite(value: float) -> None:
    chosen = torch.tensor([value], requires_grad=True)
    zero = torch.zeros(1)
    total = dpo(policy_chosen=chosen, policy_rejected=zero, reference_chosen=zero, reference_rejected=zero, beta=1.0)
    total.losses.sum().backward()
    assert torch.isfinite(total.losses).all()
    assert chosen.grad is not None and torch.isfinite(chosen.grad).all()
    assert total.losses.item() == pytest.approx(max(0.0, -value))


def test_reference_gets_no_gradient() -> None:
    reference = sums(-1.0).requires_grad_()
    policy = sums(-2.0).requires_grad_()
    dpo(
        policy_chosen=policy, policy_rejected=sums(0.0), reference_chosen=reference, reference_rejected=sums(0.0),
        beta=0.1,
    ).losses.sum().backward()  # fmt: skip
    assert reference.grad is None


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(TypeCheckError):
        dpo(
            policy_chosen=sums(1.0, 2.0),
            policy_rejected=sums(1.0),
            reference_chosen=sums(1.0, 2.0),
            reference_rejected=sums(1.0, 2.0),
            beta=0.1,
        )


def test_likelihood_counts_tokens() -> None:
    total = negative_log_likelihood(
        logprob_sum=sums(-6.0, -1.0), token_counts=torch.tensor([3, 2]), weights=sums(1.0, 2.0)
    )
    assert total.losses.tolist() == [6.0, 2.0]
    assert total.count == 5
