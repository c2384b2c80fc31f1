"""The reward model's loss: hand-worked values, pairs and rankings alike, gradients, extremes."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from prefopt.losses import reward_ranking


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def test_a_pair_by_hand() -> None:
    # Rewards 2 and 0.5: a margin of 1.5.
    total = reward_ranking(rewards=numbers(2.0, 0.5)[None])
    assert total.losses.item() == pytest.approx(softplus(-1.5))
    assert total.count == 1
    assert {name: value.item() for name, value in total.metrics.items()} == pytest.approx(
        {"rewards/chosen": 2.0, "rewards/rejected": 0.5, "rewards/margins": 1.5, "rewards/accuracies": 1.0}
    )


def test_soft_label_margin_centering_and_weight_by_hand() -> None:
    # A margin of 1.5 where 1 is wanted, right with 0.8: 0.8 * softplus(-0.5) + 0.2 * softplus(2.5), and
    # 0.01 * (2 + 0.5)^2 = 0.0625; all of it twice.
    total = reward_ranking(
        rewards=numbers(2.0, 0.5)[None],
        soft_labels=numbers(0.8),
        target_margins=numbers(1.0),
        centering=0.01,
        weights=numbers(2.0),
    )
    expected = 0.8 * softplus(-0.5) + 0.2 * softplus(2.5) + 0.01 * 6.25
    assert total.losses.item() == pytest.approx(2 * expected)
    assert total.count == 1


def test_three_completions_by_hand() -> None:
    # Rewards 1, 3, 0: differences -2, 1 and 3, a third each; the first of the pairs is the wrong way round.
    total = reward_ranking(rewards=numbers(1.0, 3.0, 0.0)[None])
    assert total.losses.item() == pytest.approx((softplus(2) + softplus(-1) + softplus(-3)) / 3)
    assert total.metrics["rewards/accuracies"].item() == pytest.approx(2 / 3)
    assert total.metrics["rewards/margins"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("k", [2, 3, 6, 9])
def test_a_ranking_is_the_mean_of_its_pairs(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    rewards = torch.randn(5, k, dtype=torch.float64, generator=generator)
    soft, margins = torch.rand(2, 5, dtype=torch.float64, generator=generator)
    options = {"soft_labels": soft, "target_margins": margins}
    whole = reward_ranking(rewards=rewards, centering=0.3, **options)
    pairs = [
        reward_ranking(rewards=rewards[:, list(pair)], centering=0.3, **options) for pair in combinations(range(k), 2)
    ]
    assert len(pairs) == math.comb(k, 2)
    torch.testing.assert_close(whole.losses, torch.stack([total.losses for total in pairs]).mean(0))
    accuracies = torch.stack([total.metrics["rewards/accuracies"] for total in pairs]).mean(0)
    torch.testing.assert_close(whole.metrics["rewards/accuracies"], accuracies)


def test_absent_completions_are_as_if_never_there() -> None:
    rewards = numbers(1.0, 99.0, 3.0, -7.0, 0.0)[None].requires_grad_()
    present = torch.tensor([[True, False, True, False, True]])
    total = reward_ranking(rewards=rewards, present=present, centering=0.1)
    alone = numbers(1.0, 3.0, 0.0)[None].requires_grad_()
    same = reward_ranking(rewards=alone, centering=0.1)
    torch.testing.assert_close(total.losses, same.losses)
    assert {n: v.item() for n, v in total.metrics.items()} == {n: v.item() for n, v in same.metrics.items()}
    total.losses.sum().backward()
    same.losses.sum().backward()
    assert rewards.grad is not None and alone.grad is not None
    torch.testing.assert_close(rewards.grad[present], alone.grad[0])
    assert not rewards.grad[~present].any()


def test_one_completion_teaches_nothing_and_k_below_two_is_no_ranking() -> None:
    total = reward_ranking(rewards=numbers(3.0, 0.0)[None], present=torch.tensor([[True, False]]), centering=1.0)
    assert total.losses.item() == 0.0
    assert total.metrics["rewards/accuracies"].item() == 0.5
    with pytest.raises(ValueError, match="at least 2"):
        reward_ranking(rewards=numbers(3.0)[None])


def test_gradients_and_their_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    soft, margins, weights = torch.rand(3, 3, dtype=torch.float64, generator=generator)
    present = torch.tensor([[True] * 4, [True, True, False, True], [True, True, False, False]])

    def losses(rewards: Tensor) -> Tensor:
        return reward_ranking(
            rewards=rewards,
            present=present,
            soft_labels=soft,
            target_margins=margins,
            centering=0.2,
            weights=weights,
        ).losses

    assert torch.autograd.gradcheck(losses, (rewards,))
    pair = numbers(0.0, 0.0)[None].requires_grad_()
    reward_ranking(rewards=pair).losses.sum().backward()
    assert pair.grad is not None
    assert pair.grad.tolist() == [[-0.5, 0.5]]  # descent raises the chosen, lowers the rejected


def test_the_centering_term_alone_pulls_the_pair_to_zero() -> None:
    """At a margin that is learnt, 30, both rewards are pulled down by 2 * 0.1 * (40 + 10) = 10."""
    pair = numbers(40.0, 10.0)[None].requires_grad_()
    reward_ranking(rewards=pair, centering=0.1).losses.sum().backward()
    assert pair.grad is not None
    torch.testing.assert_close(pair.grad, numbers(10.0, 10.0)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    total = reward_ranking(rewards=rewards, soft_labels=torch.tensor([1.0, 0.3], dtype=dtype), centering=0.01)
    total.losses.sum().backward()
    assert rewards.grad is not None
    assert torch.isfinite(total.losses).all() and torch.isfinite(rewards.grad).all()
    # The first group: pairs 2e4, 1e4 right and 1e4 wrong; centering 0, 1e8 and 1e8, a hundredth of it.
    assert total.losses[0].item() == pytest.approx((1e4 + 2e6) / 3)
