"""Objectives over K completions of one prompt in their order of preference."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefopt.losses.total import LossTotal

__all__ = ["plackett_luce", "ranking_metrics"]


def plackett_luce(
    *,
    policy: Float[Tensor, "groups k"],
    reference: Float[Tensor, "groups k"],
    present: Bool[Tensor, "groups k"] | None = None,
    beta: float,
    weights: Float[Tensor, " groups"] | None = None,
) -> LossTotal:
    """DPO for whole rankings: each completion against all that rank below it, at once.

    Rafailov et al. 2023 (arXiv 2305.18290, appendix A.3, equation 20). K = 2 is `dpo`, to the last bit.

        r_k  = beta * (log pi(y_k|x) - log pi_ref(y_k|x)),  y_1 the best
        loss = -sum over k < K of (r_k - logsumexp over j >= k of r_j)
             = -sum over k < K of log sigmoid(r_k - logsumexp over j > k of r_j)

    Args:
        policy: Log-probability under the policy, SUMMED over completion tokens, in nats, best first.
        reference: Likewise under the reference; constants.
        present: False where a group has fewer than K completions; what stands there is not looked at,
            if it is finite. Groups of one have a loss of 0.
        beta: As for `dpo`.
        weights: Multiplies a group's loss. The count stays the number of groups.

    Returns:
        Losses and count in groups, a group's loss being the sum of its K - 1 choices; metrics as for
        `dpo`, of the best and the worst completion present, except that `rewards/accuracies` is the
        share of all its pairs in the right order (a tie counts half, a group of one too).

    Raises:
        ValueError: K is below 2.

    Elsewhere:
        TRL, OpenRLHF: none. Splitting a ranking into its pairs is another loss, and counts each
        completion K - 1 times.
    """
    if policy.shape[1] < 2:
        raise ValueError(f"plackett_luce ranks at least 2 completions; got K = {policy.shape[1]}")
    if present is None:
        present = torch.ones_like(policy, dtype=torch.bool)
    rewards = torch.where(present, beta * (policy - reference.detach()), 0.0)
    losses = torch.zeros_like(rewards[:, 0])
    below = rewards[:, -1]  # logsumexp of what ranks below, where there is anything
    some_below = present[:, -1]
    # Backwards and through log sigmoid, so that the last choice is DPO's own operation on its own margin.
    for k in range(policy.shape[1] - 2, -1, -1):
        here = present[:, k]
        losses = losses + torch.where(here & some_below, -F.logsigmoid(rewards[:, k] - below), 0.0)
        if k:
            both = torch.where(some_below, torch.logaddexp(rewards[:, k], below), rewards[:, k])
            below = torch.where(here, both, below)
            some_below = some_below | here
    best, worst = _ends(present)
    logps = policy.detach()
    metrics = {"logps/chosen": logps.gather(1, best).squeeze(1), "logps/rejected": logps.gather(1, worst).squeeze(1)}
    return LossTotal(
        losses=losses if weights is None else losses * weights,
        count=len(losses),
        metrics=ranking_metrics(rewards.detach(), present) | metrics,
    )


def _ends(present: Bool[Tensor, "groups k"]) -> tuple[Int[Tensor, "groups 1"], Int[Tensor, "groups 1"]]:
    """Places of the best and of the worst completion that are present."""
    best = present.int().argmax(1, keepdim=True)
    return best, present.shape[1] - 1 - present.flip(1).int().argmax(1, keepdim=True)


def ranking_metrics(
    rewards: Float[Tensor, "groups k"], present: Bool[Tensor, "groups k"]
) -> dict[str, Float[Tensor, " groups"]]:
    """The best present against the worst present, and the share of pairs in order; what is absent is 0."""
    k = rewards.shape[1]
    best, worst = _ends(present)
    above, under = torch.triu_indices(k, k, offset=1, device=rewards.device)
    pairs = present[:, above] & present[:, under]  # [groups, k * (k - 1) / 2]
    order = torch.where(pairs, (rewards[:, above] - rewards[:, under]).sign(), 0.0).sum(1)
    chosen, rejected = rewards.gather(1, best).squeeze(1), rewards.gather(1, worst).squeeze(1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": 0.5 * (1 + order / pairs.sum(1).clamp(min=1)),
    }
