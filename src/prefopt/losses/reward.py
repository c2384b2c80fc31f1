"""What a reward model learns from: completions of one prompt in their order of preference."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from prefopt.losses.pairs import expected_loss
from prefopt.losses.ranked import ranking_metrics
from prefopt.losses.total import LossTotal

__all__ = ["reward_ranking"]


def reward_ranking(
    *,
    rewards: Float[Tensor, "groups k"],
    present: Bool[Tensor, "groups k"] | None = None,
    soft_labels: Float[Tensor, " groups"] | None = None,
    target_margins: Float[Tensor, " groups"] | None = None,
    centering: float = 0.0,
    weights: Float[Tensor, " groups"] | None = None,
) -> LossTotal:
    """For a reward model: every pair of a prompt's completions, the better one's reward above the other's.

    Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155, equation 1); K = 2 is Bradley-Terry. The margin m is
    Llama 2's (Touvron et al. 2023, arXiv 2307.09288, equation 2), the last term Eisenstein et al. 2023
    (arXiv 2312.09244, equation 2): rewards are defined up to a number a prompt, and it holds that near zero.

        d_ij = r_i - r_j, y_i ranked above y_j
        loss = mean over the K * (K - 1) / 2 pairs of
               -p * log sigmoid(d_ij - m) - (1 - p) * log sigmoid(-d_ij - m) + centering * (r_i + r_j)^2

    Args:
        rewards: A reward model's scores, the best completion first.
        present: False where a group has fewer than K completions; what stands there is not looked at,
            if it is finite. Groups of one have a loss of 0.
        soft_labels: p, a judge's probability that the earlier completion of a pair is the better; without it 1.
        target_margins: m, by how much the better one's reward should exceed the other's, at least 0.
        centering: c; 0 is none, Eisenstein et al. take 0.01.
        weights: Multiplies a group's loss. The count stays the number of groups, so that a prompt counts once
            however many completions it has.

    Returns:
        Losses and count in groups; metrics per group, of the best and the worst completion present: rewards and
        margins, and `rewards/accuracies`, the share of all its pairs in the right order (a tie counts half).

    Raises:
        ValueError: K is below 2.

    Elsewhere:
        TRL: `RewardTrainer`, pairs only, with `margin` as here and no soft labels; `center_rewards_coefficient`
        is our centering.
    """
    k = rewards.shape[1]
    if k < 2:
        raise ValueError(f"reward_ranking compares at least 2 completions; got K = {k}")
    if present is None:
        present = torch.ones_like(rewards, dtype=torch.bool)
    rewards = torch.where(present, rewards, 0.0)
    above, under = torch.triu_indices(k, k, offset=1, device=rewards.device)
    pairs = present[:, above] & present[:, under]  # [groups, k * (k - 1) / 2]
    better, worse = rewards[:, above], rewards[:, under]
    margins = 0.0 if target_margins is None else target_margins[:, None].expand_as(better).flatten()
    losses = expected_loss(
        lambda difference: -F.logsigmoid(difference - margins),
        (better - worse).flatten(),
        0.0,
        None if soft_labels is None else soft_labels[:, None].expand_as(better).flatten(),
    ).view_as(better)
    if centering:
        losses = losses + centering * (better + worse).square()
    losses = torch.where(pairs, losses, 0.0).sum(1) / pairs.sum(1).clamp(min=1)
    return LossTotal(
        losses=losses if weights is None else losses * weights,
        count=len(losses),
        metrics=ranking_metrics(rewards.detach(), present),
    )
