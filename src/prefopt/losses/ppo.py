"""Proximal policy optimisation of a language model: rewards of tokens, their advantages, the clipped losses.

Ziegler et al. 2019 (arXiv 1909.08593) and its reference code, as taken apart by Huang et al. 2024
("The N+ implementation details of RLHF with PPO", arXiv 2403.17031). Targets are completion tokens in the
order of a packed batch: sequence after sequence, each sequence's tokens one behind the other.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.total import LossTotal

__all__ = [
    "Advantages",
    "adapted_kl_coef",
    "explained_variance",
    "generalized_advantages",
    "ppo",
    "token_rewards",
    "whiten",
]

_LOG_RATIO_BOUND = 40.0  # e^40: far beyond any clip, and still finite in float32 when it is squared


@dataclass(frozen=True)
class Advantages:
    """Per target.

    Attributes:
        advantages: How much better than its value the token turned out.
        returns: What the value model is to predict: advantage + value.
    """

    advantages: Float[Tensor, " targets"]
    returns: Float[Tensor, " targets"]


def token_rewards(
    *,
    scores: Float[Tensor, " sequences"],
    log_ratios: Float[Tensor, " targets"],
    token_counts: Int[Tensor, " sequences"],
    kl_coef: float,
) -> Float[Tensor, " targets"]:
    """-kl_coef * (log pi(token) - log pi_ref(token)), and the sequence's score at its last token.

    Ziegler et al. 2019, equation 2.

    Args:
        log_ratios: Of the policy that sampled to the reference, nats.
        token_counts: Targets of each sequence, at least one.
    """
    rewards = -kl_coef * log_ratios
    last = token_counts.cumsum(0) - 1
    rewards[last] += scores.to(rewards.dtype)
    return rewards


def generalized_advantages(
    *,
    rewards: Float[Tensor, " targets"],
    values: Float[Tensor, " targets"],
    token_counts: Int[Tensor, " sequences"],
    gamma: float,
    lam: float,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16).

        delta_t = r_t + gamma * V_(t+1) - V_t,    A_t = delta_t + gamma * lam * A_(t+1)

    Behind a sequence's last token there is nothing: V and A are 0 there.
    """
    longest = int(token_counts.max())
    steps = torch.arange(longest, device=rewards.device)
    within = steps < token_counts[:, None]  # [sequences, longest]
    grid = rewards.new_zeros(2, len(token_counts), longest + 1)  # one column of nothing at the end
    grid[0, :, :-1][within], grid[1, :, :-1][within] = rewards, values
    earned, value = grid[0], grid[1]
    deltas = earned[:, :-1] + gamma * value[:, 1:] - value[:, :-1]
    found = torch.zeros_like(earned)
    for t in range(longest - 1, -1, -1):
        found[:, t] = deltas[:, t] + gamma * lam * found[:, t + 1]
    advantages = found[:, :-1][within]
    return Advantages(advantages, advantages + values)


def whiten(values: Float[Tensor, " targets"], *, shift_mean: bool = True) -> Float[Tensor, " targets"]:
    """Scaled to variance 1 (with n, not n - 1, as in the reference code) and, unless told otherwise, to mean 0."""
    mean = values.mean()
    whitened = (values - mean) * torch.rsqrt(values.var(correction=0) + 1e-8)
    return whitened if shift_mean else whitened + mean


def ppo(
    *,
    logprobs: Float[Tensor, " targets"],
    old_logprobs: Float[Tensor, " targets"],
    advantages: Float[Tensor, " targets"],
    values: Float[Tensor, " targets"],
    old_values: Float[Tensor, " targets"],
    returns: Float[Tensor, " targets"],
    group_of_target: Int[Tensor, " targets"],
    groups: int,
    clip: float,
    value_clip: float,
    value_coef: float,
) -> LossTotal:
    """The clipped losses of policy and value model (Schulman et al. 2017, arXiv 1707.06347, equation 7).

        rho = pi(token) / pi_old(token)
        policy = max(-A * rho, -A * clip(rho, 1 - clip, 1 + clip))
        value = max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2
        loss = policy + value_coef * value

    Summed over tokens and counted per token: total / count is the token mean.

    Args:
        logprobs, values: Of the present policy and value model; differentiable.
        old_logprobs, old_values: Of those that sampled; constants, like advantages and returns.
        group_of_target: Which group each target belongs to.
        groups: How many groups there are.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    policy = torch.maximum(unclipped, clipped)
    near = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    error, near_error = (values - returns) ** 2, (near - returns) ** 2
    value = 0.5 * torch.maximum(error, near_error)
    losses = (policy + value_coef * value).new_zeros(groups).index_add(0, group_of_target, policy + value_coef * value)

    def per_group(quantity: Tensor) -> Tensor:
        """Its mean over a group's tokens."""
        sums = quantity.detach().float().new_zeros(groups).index_add(0, group_of_target, quantity.detach().float())
        return sums / group_of_target.bincount(minlength=groups)

    metrics = {
        "loss/policy": per_group(policy),
        "loss/value": per_group(value),
        "clip_fraction": per_group(clipped > unclipped),
        "value_clip_fraction": per_group(near_error > error),
        "update_kl": per_group(0.5 * log_ratio**2),
    }
    return LossTotal(losses=losses, count=len(logprobs), metrics=metrics)


def adapted_kl_coef(kl_coef: float, *, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The adaptive controller (Ziegler et al. 2019, section 2.2).

        coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)

    Args:
        kl: Mean over this batch's sequences of their log-ratio sums, nats.
        episodes: Sequences in the batch.
        horizon: Episodes in which the coefficient may change by a factor of about e^0.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)


def explained_variance(values: Float[Tensor, " targets"], returns: Float[Tensor, " targets"]) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 a constant's; 0 where returns do not vary."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if float(variance) > 0 else 0.0
