"""PPO's rewards, advantages, whitening, losses and controller against numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from prefopt.losses import LossTotal
from prefopt.losses.ppo import (
    adapted_kl_coef,
    explained_variance,
    generalized_advantages,
    ppo,
    token_rewards,
    whiten,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, doubles(*expected), atol=1e-12, rtol=1e-12)


# Two sequences, of three tokens and of one.
REWARDS, VALUES, COUNTS = doubles(0.0, 0.5, 1.0, -1.0), doubles(0.2, 0.4, 0.6, 0.5), torch.tensor([3, 1])


def advantages(gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    found = generalized_advantages(rewards=REWARDS, values=VALUES, token_counts=COUNTS, gamma=gamma, lam=lam)
    return found.advantages, found.returns


def test_every_token_pays_for_its_log_ratio_and_the_last_one_earns_the_score() -> None:
    found = token_rewards(
        scores=doubles(1.0, -2.0),
        log_ratios=doubles(0.5, -0.25, 0.1),
        token_counts=torch.tensor([2, 1]),
        kl_coef=0.2,
    )
    # -0.2 * 0.5;  0.2 * 0.25 + 1;  -0.2 * 0.1 - 2
    near(found, -0.1, 1.05, -2.02)


def test_advantages_by_hand() -> None:
    # delta_2 = 1 - 0.6 = 0.4                      A_2 = 0.4
    # delta_1 = 0.5 + 0.9 * 0.6 - 0.4 = 0.64       A_1 = 0.64 + 0.45 * 0.4 = 0.82
    # delta_0 = 0 + 0.9 * 0.4 - 0.2 = 0.16         A_0 = 0.16 + 0.45 * 0.82 = 0.529
    # The other sequence: -1 - 0.5 = -1.5, whatever stands beside it.
    estimate, returns = advantages(gamma=0.9, lam=0.5)
    near(estimate, 0.529, 0.82, 0.4, -1.5)
    near(returns, 0.529 + 0.2, 0.82 + 0.4, 0.4 + 0.6, -1.0)


def test_lambda_0_looks_one_token_ahead() -> None:
    estimate, _ = advantages(gamma=0.9, lam=0.0)
    near(estimate, 0.16, 0.64, 0.4, -1.5)


def test_lambda_1_returns_what_was_earned_from_here_on() -> None:
    # Discounted sums of rewards: 1;  0.5 + 0.9 * 1 = 1.4;  0 + 0.9 * 1.4 = 1.26. Values cancel.
    estimate, returns = advantages(gamma=0.9, lam=1.0)
    near(returns, 1.26, 1.4, 1.0, -1.0)
    near(estimate, 1.26 - 0.2, 1.4 - 0.4, 1.0 - 0.6, -1.0 - 0.5)
    near(advantages(gamma=1.0, lam=1.0)[1], 1.5, 1.5, 1.0, -1.0)


def test_a_sequence_ends_where_it_ends() -> None:
    """Shorter or longer neighbours, before or behind, leave a sequence's advantages alone."""
    short, long = slice(3, 4), slice(0, 3)
    both = advantages(gamma=0.9, lam=0.5)[0]
    for part, counts in ((short, [1]), (long, [3])):
        alone = generalized_advantages(
            rewards=REWARDS[part], values=VALUES[part], token_counts=torch.tensor(counts), gamma=0.9, lam=0.5
        )
        assert torch.equal(alone.advantages, both[part])


def test_whitening_by_hand() -> None:
    # Mean 3; variance (4 + 1 + 0 + 9) / 4 = 3.5, with n and not n - 1.
    values, scale = doubles(1.0, 2.0, 3.0, 6.0), 1 / math.sqrt(3.5 + 1e-8)
    near(whiten(values), -2 * scale, -scale, 0.0, 3 * scale)
    near(whiten(values, shift_mean=False), 3 - 2 * scale, 3 - scale, 3.0, 3 + 3 * scale)


def test_what_does_not_vary_whitens_to_its_mean() -> None:
    near(whiten(doubles(2.0, 2.0)), 0.0, 0.0)
    near(whiten(doubles(2.0, 2.0), shift_mean=False), 2.0, 2.0)
    near(whiten(doubles(7.0)), 0.0)


# Five tokens of two groups. Ratios 1.5 and 0.5 under advantages of either sign, and 1.1 within the clip.
RATIOS, ADVANTAGES = doubles(1.5, 0.5, 0.5, 1.5, 1.1), doubles(1.0, 1.0, -2.0, -2.0, 3.0)
OLD = doubles(-1.0, -2.0, -3.0, -4.0, -0.5)
GROUPS = torch.tensor([0, 0, 0, 1, 1])
# The value may move by 0.2 from 0: forward beyond it, away beyond it, within, beyond it past the return, none.
NOW, RETURNS = doubles(0.5, -0.5, 0.1, 0.5, 0.0), doubles(1.0, 1.0, 1.0, 0.3, -2.0)


def losses(
    logprobs: Tensor,
    values: Tensor = NOW,
    *,
    advantages: Tensor = ADVANTAGES,
    part: slice = slice(None),
    groups: int = 2,
    value_coef: float = 0.1,
) -> LossTotal:
    return ppo(
        logprobs=logprobs[part],
        old_logprobs=OLD[part].to(logprobs.dtype),
        advantages=advantages[part].to(logprobs.dtype),
        values=values[part],
        old_values=torch.zeros_like(values)[part],
        returns=RETURNS[part].to(values.dtype),
        group_of_target=GROUPS[part] - GROUPS[part].min(),
        groups=groups,
        clip=0.2,
        value_clip=0.2,
        value_coef=value_coef,
    )


def test_losses_by_hand() -> None:
    # Policy, max(-A rho, -A clip(rho, 0.8, 1.2)):
    #   A 1,  rho 1.5: max(-1.5, -1.2) = -1.2 clipped     A 1, rho 0.5: max(-0.5, -0.8) = -0.5
    #   A -2, rho 0.5: max(1.0, 1.6) = 1.6 clipped        A -2, rho 1.5: max(3.0, 2.4) = 3.0
    #   A 3,  rho 1.1: -3.3 both ways
    # Value, max((V - R)^2, (clip(V, -0.2, 0.2) - R)^2) / 2:
    #   V 0.5, R 1: max(0.25, 0.64) / 2 = 0.32 clipped    V -0.5, R 1: max(2.25, 1.44) / 2 = 1.125
    #   V 0.1, R 1: 0.81 / 2 = 0.405                      V 0.5, R 0.3: max(0.04, 0.01) / 2 = 0.02
    #   V 0, R -2: 4 / 2 = 2
    total = losses(OLD + RATIOS.log())
    first = (-1.2 - 0.5 + 1.6) + 0.1 * (0.32 + 1.125 + 0.405)
    second = (3.0 - 3.3) + 0.1 * (0.02 + 2.0)
    near(total.losses, first, second)
    assert total.count == 5

    logs = [math.log(r) ** 2 / 2 for r in (1.5, 0.5, 0.5, 1.5, 1.1)]
    by_hand = {
        "loss/policy": [-0.1 / 3, -0.3 / 2],
        "loss/value": [1.85 / 3, 2.02 / 2],
        "clip_fraction": [2 / 3, 0.0],
        "value_clip_fraction": [1 / 3, 0.0],
        "update_kl": [sum(logs[:3]) / 3, sum(logs[3:]) / 2],
    }
    assert total.metrics.keys() == by_hand.keys()
    for name, expected in by_hand.items():
        assert total.metrics[name].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7), name
        assert not total.metrics[name].requires_grad


def test_micro_batches_add_up() -> None:
    """Sums and counts of the two groups by themselves are those of both together."""
    logprobs = OLD + RATIOS.log()
    whole, parts = losses(logprobs), [losses(logprobs, part=p, groups=1) for p in (slice(0, 3), slice(3, 5))]
    torch.testing.assert_close(torch.cat([p.losses for p in parts]), whole.losses)
    assert sum(p.count for p in parts) == whole.count
    for name, values in whole.metrics.items():
        torch.testing.assert_close(torch.cat([p.metrics[name] for p in parts]), values)


def test_before_any_step_the_loss_is_minus_the_advantages() -> None:
    """rho = 1: what is left is -A, and the gradient of -A log pi: the policy gradient itself."""
    logprobs = OLD.clone().requires_grad_()
    total = losses(logprobs, value_coef=0.0)
    near(total.losses.detach(), 0.0, -1.0)  # -(1 + 1 - 2), -(-2 + 3)
    total.losses.sum().backward()
    assert logprobs.grad is not None
    near(logprobs.grad, *(-ADVANTAGES).tolist())


def test_gradients_point_where_they_should() -> None:
    logprobs, values = (OLD + RATIOS.log()).requires_grad_(), NOW.clone().requires_grad_()
    losses(logprobs, values).losses.sum().backward()
    assert logprobs.grad is not None and values.grad is not None
    # Clipped tokens pull no more; the others by -A rho: 1 * 0.5, -2 * 1.5, 3 * 1.1.
    near(logprobs.grad, 0.0, -0.5, 0.0, 3.0, -3.3)
    # value_coef * (V - R), and nothing where the clipped error is the larger one.
    near(values.grad, 0.0, 0.1 * -1.5, 0.1 * -0.9, 0.1 * 0.2, 0.1 * 2.0)


def test_gradients_are_those_of_finite_differences() -> None:
    """Of both arguments, away from the corners of the clips."""
    logprobs, values = (OLD + RATIOS.log()).requires_grad_(), NOW.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: losses(a, b).losses, (logprobs, values))


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_extremes_stay_finite(extreme: float) -> None:
    """In float32, log-probabilities, advantages and values as far off as they could ever be."""
    logprobs = torch.full((5,), extreme, requires_grad=True)
    values = torch.full((5,), -extreme, requires_grad=True)
    total = losses(logprobs, values, advantages=ADVANTAGES * 1e4)
    total.losses.sum().backward()
    for tensor in (total.losses, logprobs.grad, values.grad, *total.metrics.values()):
        assert tensor is not None and torch.isfinite(tensor).all()


@pytest.mark.parametrize(
    ("kl", "error"),
    [
        (6.0, 0.0),
        (6.6, 0.1),  # 6.6 / 6 - 1
        (5.4, -0.1),
        (9.0, 0.2),  # 0.5, clipped
        (0.0, -0.2),  # -1, clipped
        (-3.0, -0.2),  # an estimate may be negative
    ],
)
def test_the_controller_by_hand(kl: float, error: float) -> None:
    # 64 episodes of 10,000: 0.15 * (1 + error * 0.0064)
    found = adapted_kl_coef(0.15, kl=kl, target=6.0, episodes=64, horizon=10_000)
    assert found == pytest.approx(0.15 * (1 + error * 0.0064), rel=1e-12)


def test_explained_variance_by_hand() -> None:
    # Returns vary by 1.25; what is left, (0, 0, 0, -1), by 1/4 - 1/16 = 0.1875: 1 - 0.15.
    returns = doubles(1.0, 2.0, 3.0, 4.0)
    assert explained_variance(doubles(1.0, 2.0, 3.0, 5.0), returns) == pytest.approx(0.85)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 7, returns) == pytest.approx(1.0), "a constant is no variance"
    assert explained_variance(torch.zeros_like(returns), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)  # 2 * returns is left: 1 - 4
    assert explained_variance(returns, torch.ones_like(returns)) == 0.0
