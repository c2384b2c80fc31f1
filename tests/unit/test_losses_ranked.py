"""DPO over whole rankings: hand-worked values, DPO itself at K = 2, and groups with fewer completions."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from prefopt.losses import dpo, plackett_luce


def sums(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_plackett_luce_by_hand() -> None:
    # Rewards 2, 1, 0: first place with e^2 of e^2 + e + 1, second with e of e + 1.
    total = plackett_luce(policy=sums(4.0, 2.0, 0.0)[None], reference=sums(0.0, 0.0, 0.0)[None], beta=0.5)
    e = math.e
    assert total.losses.item() == pytest.approx(-math.log(e**2 / (e**2 + e + 1)) - math.log(e / (e + 1)))
    assert total.count == 1
    assert total.metrics["rewards/margins"].item() == pytest.approx(2.0)
    assert total.metrics["rewards/accuracies"].item() == 1.0


def test_probabilities_of_all_rankings_sum_to_one() -> None:
    policy = sums(1.0, -0.5, 2.0, 0.3)
    orders = torch.stack([policy[list(order)] for order in permutations(range(4))])
    total = plackett_luce(policy=orders, reference=torch.zeros_like(orders), beta=1.3)
    assert torch.exp(-total.losses).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("beta", [0.1, 0.37, 2.0])
def test_two_completions_are_dpo_to_the_last_bit(beta: float) -> None:
    g = torch.Generator().manual_seed(5)
    policy, reference = -200 * torch.rand(2, 500, 2, generator=g)
    weights = torch.rand(500, generator=g)
    ranked, chosen, rejected = policy.clone().requires_grad_(), *(p.clone().requires_grad_() for p in policy.unbind(1))
    whole = plackett_luce(policy=ranked, reference=reference, beta=beta, weights=weights)
    pairs = dpo(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=reference[:, 0],
        reference_rejected=reference[:, 1],
        beta=beta,
        weights=weights,
    )
    assert whole.losses.dtype == torch.float32
    assert torch.equal(whole.losses, pairs.losses)
    for name, metric in whole.metrics.items():
        assert torch.equal(metric, pairs.metrics[name]), name
    whole.losses.sum().backward()
    pairs.losses.sum().backward()
    assert ranked.grad is not None and chosen.grad is not None and rejected.grad is not None
    assert torch.equal(ranked.grad, torch.stack([chosen.grad, rejected.grad], 1))


def test_absent_completions_are_as_if_never_there() -> None:
    policy = sums(4.0, 99.0, 2.0, -1.0, 77.0)[None].requires_grad_()
    present = torch.tensor([[True, False, True, True, False]])
    total = plackett_luce(policy=policy, reference=torch.zeros(1, 5, dtype=torch.float64), present=present, beta=0.5)
    short = sums(4.0, 2.0, -1.0)[None].requires_grad_()
    alone = plackett_luce(policy=short, reference=torch.zeros(1, 3, dtype=torch.float64), beta=0.5)
    torch.testing.assert_close(total.losses, alone.losses)
    assert {n: m.item() for n, m in total.metrics.items()} == {n: m.item() for n, m in alone.metrics.items()}
    total.losses.sum().backward()
    alone.losses.sum().backward()
    assert policy.grad is not None and short.grad is not None
    torch.testing.assert_close(policy.grad[present], short.grad[0])
    assert (policy.grad[~present] == 0).all()


def test_a_group_of_one_says_nothing() -> None:
    policy = sums(1.0, 5.0)[None]
    total = plackett_luce(policy=policy, reference=policy, present=torch.tensor([[True, False]]), beta=1.0)
    assert total.losses.item() == 0.0 and total.metrics["rewards/accuracies"].item() == 0.5
    with pytest.raises(ValueError, match="got K = 1"):
        plackett_luce(policy=sums(1.0)[None], reference=sums(1.0)[None], beta=1.0)
