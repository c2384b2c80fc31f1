"""The logistic preference losses: DPO, conservative where labels are uncertain, and robust to flipped ones."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.losses.pairs import bradley_terry, implicit_reward, pair_total, smoothed
from prefopt.losses.total import LossTotal

__all__ = ["dpo", "robust_dpo"]


def dpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """The first choice: learn from pairs by classification, with no reward model and no sampling.

    Rafailov et al. 2023 (arXiv 2305.18290, equation 7); conservative DPO, eps > 0, is Mitchell 2023
    (ericmitchell.ai/cdpo.pdf, equation 3): labels are wrong with probability eps, and the minimum lies
    at m = log((1 - eps) / eps) instead of at infinity.

        r(y) = beta * (log pi(y|x) - log pi_ref(y|x)),  m = r(y_w) - r(y_l)
        loss = -(1 - eps) * log sigmoid(m) - eps * log sigmoid(-m)

    Args:
        policy_chosen, policy_rejected: Log-probability under the policy, SUMMED over completion tokens,
            in nats.
        reference_chosen, reference_rejected: Likewise under the reference; constants.
        beta: Strength of the pull to the reference. The paper: 0.1, and 0.5 for summaries.
        label_smoothing: eps, in [0, 0.5); 0 is the paper's loss.
        soft_labels: A judge's probability that the chosen completion is the better, in [0, 1]; it stands
            for 1 - eps, pair by pair, and eps then flips that share of what the judge says.
        weights: Multiplies a pair's loss. The count stays the number of pairs, so a weight of 0.5
            halves a pair's pull whatever its neighbours weigh.

    Returns:
        Losses and count in pairs; metrics per pair: rewards, margins, accuracies (a tie counts half,
        so that equal models start at chance) and `importance_weight`, which for certain labels is the
        paper's sigmoid(-m), the factor that its gradient (below equation 7) gives the pair.

    Elsewhere:
        TRL: `sigmoid`. `label_smoothing` is accepted beside it and silently ignored (1.16).
        OpenRLHF: the same, with its `label_smoothing` acting as here.
    """
    return bradley_terry(
        rewards=(
            implicit_reward(beta, policy_chosen, reference_chosen),
            implicit_reward(beta, policy_rejected, reference_rejected),
        ),
        policy=(policy_chosen, policy_rejected),
        label_smoothing=label_smoothing,
        soft_labels=soft_labels,
        weights=weights,
    )


def robust_dpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.1,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """For labels of which a known share is flipped: on average the loss that clean labels would give.

    Chowdhury et al. 2024 (robust DPO, arXiv 2403.00409, section 3.1). Unlike conservative DPO it is not
    bounded below: a pair that is ranked right by far goes on lowering it, with slope eps / (1 - 2 eps).

        m    = r(y_w) - r(y_l), r as for `dpo`
        loss = (-(1 - eps) * log sigmoid(m) + eps * log sigmoid(-m)) / (1 - 2 * eps)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: As for `dpo`; the paper: 0.01.
        label_smoothing: eps, the share of flipped labels, in [0, 0.5); the paper: 0.1. With 0 it is `dpo`.
        weights: As for `dpo`.

    Raises:
        ValueError: eps is not in [0, 0.5).

    Elsewhere:
        TRL: `robust`, the same; outside [0, 0.5) it warns and goes on, though the sign then turns.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    margins = chosen - rejected
    right = smoothed(label_smoothing, None)
    wrong, clean = 1 - right, 2 * right - 1
    return pair_total(
        (-right * F.logsigmoid(margins) + wrong * F.logsigmoid(-margins)) / clean,
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
        importance_weight=(right * (-margins).sigmoid() + wrong * margins.sigmoid()) / clean,
    )
