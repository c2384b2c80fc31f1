"""Losses that judge each completion against the reference by itself, and not only the two against each other."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.losses.pairs import implicit_reward, pair_total, smoothed
from prefopt.losses.total import LossTotal

__all__ = ["apo_down", "apo_zero", "bco_pair", "nca", "sppo_hard", "sppo_soft"]


def nca(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Keeps the chosen completion's likelihood from falling, which DPO lets happen.

    Chen et al. 2024 (noise contrastive alignment, arXiv 2402.05369, section 4.1), K = 2 completions.

        r(y) = beta * (log pi(y|x) - log pi_ref(y|x))
        loss = -log sigmoid(r(y_w)) - (1/2) * log sigmoid(-r(y_w)) - (1/2) * log sigmoid(-r(y_l))

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: As for `dpo`; the paper: 0.01.
        soft_labels: As for `dpo`: the first term becomes -p * log sigmoid(r(y_w)) - (1 - p) * log
            sigmoid(r(y_l)), as the paper has it for rewards, p being their softmax.
        weights: As for `dpo`.

    Elsewhere:
        TRL: `nca_pair`, the same for certain labels; soft ones it has not.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    right = smoothed(0.0, soft_labels)
    better = right * F.logsigmoid(chosen) + (1 - right) * F.logsigmoid(rejected)
    return pair_total(
        -better - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected),
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )


def bco_pair(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    reward_shift: Float[Tensor, ""] | float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """A classifier of good and bad completions whose logit is the implicit reward; also for mixtures.

    Jung et al. 2024 (binary classifier optimization, arXiv 2404.04656, section 4), on pairs.

        r(y)  = beta * (log pi(y|x) - log pi_ref(y|x))
        loss  = -log sigmoid(r(y_w) - delta) - log sigmoid(-(r(y_l) - delta))
        delta = (E[r(y_w)] + E[r(y_l)]) / 2

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: As for `dpo`; the paper: 0.01.
        reward_shift: delta, a constant: the caller's running mean over the steps so far of half the sum
            of the metrics `rewards/chosen` and `rewards/rejected`. 0.0 before there is any.
        weights: As for `dpo`.

    Elsewhere:
        TRL: `bco_pair` has no delta: it is this with `reward_shift=0.0`. Its BCO trainer had
        one; 1.16 has no such trainer.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    return pair_total(
        -F.logsigmoid(chosen - reward_shift) - F.logsigmoid(reward_shift - rejected),
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )


def sppo_hard(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Self-play where all that is known is which of two of the policy's own samples won.

    Wu et al. 2024 (SPPO, arXiv 2405.00675, equation 4.7), with P = 1 for the winner, 0 for the loser.

        loss = (log pi(y_w|x) - log pi_ref(y_w|x) - 1 / (2 * beta))^2
             + (log pi(y_l|x) - log pi_ref(y_l|x) + 1 / (2 * beta))^2

    Args:
        policy_chosen, policy_rejected: As for `dpo`.
        reference_chosen, reference_rejected: As for `dpo`; in the paper the policy of the iteration before.
        beta: 1 / eta of the paper, which takes eta = 1000, that is, 0.001.
        weights: As for `dpo`.

    Returns:
        As for `dpo`; the rewards aimed at are 1/2 and -1/2.

    Elsewhere:
        TRL: `sppo_hard`, the same. The authors' code (`sppo_single` with a probability of 1) halves it.
    """
    return sppo_soft(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_wins=torch.ones_like(policy_chosen),
        rejected_wins=torch.zeros_like(policy_rejected),
        beta=beta,
        weights=weights,
    )


def sppo_soft(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    chosen_wins: Float[Tensor, " pairs"],
    rejected_wins: Float[Tensor, " pairs"],
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Self-play with a judge: each sample's log-ratio is drawn to how often it beats the policy.

    Wu et al. 2024 (SPPO, arXiv 2405.00675, equation 4.7). Where preferences run in circles, its
    iterations still approach a policy that no other beats.

        loss = (log pi(y_w|x) - log pi_ref(y_w|x) - (P_w - 1/2) / beta)^2
             + (log pi(y_l|x) - log pi_ref(y_l|x) - (P_l - 1/2) / beta)^2

    Args:
        policy_chosen, policy_rejected: As for `dpo`.
        reference_chosen, reference_rejected: As for `dpo`; in the paper the policy of the iteration before.
        chosen_wins, rejected_wins: P, the probability in [0, 1] that this completion beats one sampled
            from the policy: in the paper a judge's mean over the K samples of the prompt. From a
            judgement p of the two alone: p and 1 - p.
        beta: 1 / eta of the paper, which takes eta = 1000, that is, 0.001.
        weights: As for `dpo`.

    Returns:
        As for `dpo`; the rewards aimed at are P - 1/2.

    Elsewhere:
        TRL: none but `sppo_hard`. The authors' code (`sppo`, and `sppo_single` for p and 1 - p) halves it.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    return pair_total(
        ((chosen - (chosen_wins - 0.5)) / beta) ** 2 + ((rejected - (rejected_wins - 0.5)) / beta) ** 2,
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )


def apo_zero(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """For chosen completions BETTER than what the model writes: they go up, the rejected go down.

    D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266, equation 7).

        r(y) = beta * (log pi(y|x) - log pi_ref(y|x))
        loss = -sigmoid(r(y_w)) + sigmoid(r(y_l))

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: As for `dpo`; the paper: 0.1.
        weights: As for `dpo`.

    Elsewhere:
        TRL: `apo_zero` adds 1, so equal models start at 1 there and at 0 here; gradients are the same.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    return pair_total(
        rejected.sigmoid() - chosen.sigmoid(),
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )


def apo_down(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """For chosen completions WORSE than what the model writes: both go down, the rejected further.

    D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266, equation 8).

        r(y) = beta * (log pi(y|x) - log pi_ref(y|x))
        loss = sigmoid(r(y_w)) - sigmoid(r(y_w) - r(y_l))

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: As for `dpo`; the paper: 0.1.
        weights: As for `dpo`.

    Elsewhere:
        TRL: `apo_down` adds 1, so equal models start at 1 there and at 0 here; gradients are the same.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    return pair_total(
        chosen.sigmoid() - (chosen - rejected).sigmoid(),
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )
