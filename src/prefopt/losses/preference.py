"""Preference objectives over pairs. Pure: tensors in, losses and their metrics out."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.losses.total import LossTotal

__all__ = ["dpo"]


def dpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.0,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    With implicit rewards r = beta * (log pi(y|x) - log pi_ref(y|x)) and margin m = r_w - r_l:

        loss = -(1 - eps) * log sigmoid(m) - eps * log sigmoid(-m)

    eps = 0 is the paper's loss; eps > 0 is conservative DPO (Mitchell 2023): labels are wrong with
    probability eps, and the loss has its minimum at m = log((1 - eps) / eps).

    Args:
        policy_chosen: Log-probability under the policy, SUMMED over completion tokens, in nats;
            likewise the other three. The reference's are constants.
        beta: Strength of the pull to the reference.
        label_smoothing: eps, in [0, 0.5).
        weights: Multiplies a pair's loss. The count stays the number of pairs, so a weight of 0.5
            halves a pair's pull whatever its neighbours weigh.

    Returns:
        Losses and count in pairs; metrics per pair: rewards, margins, accuracies (a tie counts half,
        so that equal models start at chance) and `importance_weight` = sigmoid(-m), the factor that
        the paper's gradient (equation after 7) gives the pair.
    """
    rewards_chosen = beta * (policy_chosen - reference_chosen.detach())
    rewards_rejected = beta * (policy_rejected - reference_rejected.detach())
    margins = rewards_chosen - rewards_rejected
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    if weights is not None:
        losses = losses * weights
    chosen, rejected, margin = rewards_chosen.detach(), rewards_rejected.detach(), margins.detach()
    return LossTotal(
        losses=losses,
        count=len(losses),
        metrics={
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margin,
            "rewards/accuracies": 0.5 * (1 + margin.sign()),
            "importance_weight": (-margin).sigmoid(),
            "logps/chosen": policy_chosen.detach(),
            "logps/rejected": policy_rejected.detach(),
        },
    )
