"""Other losses of the same margin of implicit rewards: squared (IPO), hinge, EXO, DiscoPOP."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.pairs import (
    expected_loss,
    implicit_reward,
    pair_total,
    smoothed,
    token_mean,
)
from prefopt.losses.total import LossTotal

__all__ = ["discopop", "exo", "hinge", "ipo", "ipo_sum"]


def ipo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    rejected_tokens: Int[Tensor, " pairs"],
    beta: float,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """For labels without noise: a margin of fixed size is enough, so certain pairs are not over-fitted.

    Azar et al. 2023 (arXiv 2310.12036, equation 17), on log-probabilities averaged over tokens: so its
    authors advised afterwards (Hugging Face's comparison of DPO, IPO and KTO, January 2024, addendum).
    `ipo_sum` is the equation as printed.

        h    = (log pi(y_w|x) - log pi_ref(y_w|x)) / |y_w| - (log pi(y_l|x) - log pi_ref(y_l|x)) / |y_l|
        loss = (h - 1 / (2 * beta))^2

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        chosen_tokens, rejected_tokens: |y|, the tokens that each sum holds.
        beta: The paper's tau: the margin aimed at is 1 / (2 beta) nats per token.
        soft_labels: As for `dpo`: with probability 1 - p the target is -1 / (2 beta).
        weights: As for `dpo`.

    Returns:
        As for `dpo`; rewards are beta times the token mean, so that a margin of 1/2 is the target.

    Elsewhere:
        TRL: `ipo`, the same. OpenRLHF and the DPO authors' code: `ipo_sum`.
    """
    return _squared(
        rewards=(
            token_mean(implicit_reward(beta, policy_chosen, reference_chosen), chosen_tokens),
            token_mean(implicit_reward(beta, policy_rejected, reference_rejected), rejected_tokens),
        ),
        policy=(policy_chosen, policy_rejected),
        beta=beta,
        soft_labels=soft_labels,
        weights=weights,
    )


def ipo_sum(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """IPO as printed, to reproduce results made with summed log-probabilities; otherwise take `ipo`.

    Azar et al. 2023 (arXiv 2310.12036, equation 17).

        h    = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))
        loss = (h - 1 / (2 * beta))^2

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: The paper's tau: the margin aimed at is 1 / (2 beta) nats per completion.
        soft_labels, weights: As for `ipo`.

    Returns:
        As for `dpo`; a margin of 1/2 is the target.

    Elsewhere:
        OpenRLHF's and the DPO authors' IPO, the same. TRL: none; its `ipo` averages over tokens.
    """
    return _squared(
        rewards=(
            implicit_reward(beta, policy_chosen, reference_chosen),
            implicit_reward(beta, policy_rejected, reference_rejected),
        ),
        policy=(policy_chosen, policy_rejected),
        beta=beta,
        soft_labels=soft_labels,
        weights=weights,
    )


def _squared(
    *,
    rewards: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    policy: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    beta: float,
    soft_labels: Float[Tensor, " pairs"] | None,
    weights: Float[Tensor, " pairs"] | None,
) -> LossTotal:
    """(h - 1 / (2 beta))^2 of the margin beta * h."""
    margins = rewards[0] - rewards[1]
    aim = 2 * smoothed(0.0, soft_labels) - 1
    return pair_total(
        expected_loss(lambda m: ((m - 0.5) / beta) ** 2, margins, 0.0, soft_labels),
        rewards=rewards,
        policy=policy,
        weights=weights,
        importance_weight=(aim - 2 * margins) / beta**2,
    )


def hinge(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Pairs that are apart far enough no longer pull at all; the others all pull alike.

    Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425) with the reference inside, as Liu et al. 2023 (RSO,
    arXiv 2309.06657, hinge-norm) write it.

        m    = r(y_w) - r(y_l), r as for `dpo`
        loss = max(0, 1 - m)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: RSO's gamma: 1 / beta nats is the margin wanted.
        weights: As for `dpo`.

    Elsewhere:
        TRL: `hinge`, the same. SLiC-HF itself has no reference in the margin, and adds a likelihood term.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    short = 1 - (chosen - rejected)
    return pair_total(
        F.relu(short),
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
        importance_weight=(short > 0).to(short.dtype),
    )


def exo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 1e-3,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """The reverse KL to the label where DPO has the forward one: mode-seeking, as RLHF's objective is.

    Ji et al. 2024 (EXO, arXiv 2402.00856, equation 16, K = 2).

        m    = r(y_w) - r(y_l), r as for `dpo`;  q = sigmoid(m)
        loss = q * (log q - log(1 - eps)) + (1 - q) * (log(1 - q) - log eps)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: The paper's beta_pi, 0.1.
        label_smoothing: eps, in (0, 0.5): with certain labels the divergence is infinite. The paper: 1e-3.
        soft_labels: As for `dpo`: p, moved by eps away from 0 and 1, stands for 1 - eps.
        weights: As for `dpo`.

    Raises:
        ValueError: eps is not in (0, 0.5).

    Elsewhere:
        TRL: `exo_pair`, the same; its default eps is 0, which it refuses.
    """
    if not label_smoothing:
        raise ValueError(
            "exo needs label_smoothing > 0 (the paper: 1e-3): its divergence from certain labels is infinite"
        )
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    margins = chosen - rejected
    right = torch.as_tensor(smoothed(label_smoothing, soft_labels), dtype=margins.dtype, device=margins.device)
    won, lost = margins.sigmoid(), (-margins).sigmoid()
    return pair_total(
        won * (F.logsigmoid(margins) - right.log()) + lost * (F.logsigmoid(-margins) - (1 - right).log()),
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
        importance_weight=won * lost * (right.logit() - margins),
    )


def discopop(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    tau: float = 0.05,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """A loss that a language model found by search: logistic for mis-ranked pairs, exponential for others.

    Lu et al. 2024 (DiscoPOP, arXiv 2406.08414, equation 5). Not convex: at the paper's parameters it has
    a local minimum where log-ratios differ by -2.37 nats, in which pairs just mis-ranked may stay.

        m    = r(y_w) - r(y_l), r as for `dpo`;  s = sigmoid(m / tau)
        loss = (1 - s) * -log sigmoid(m) + s * exp(-m)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: As for `dpo`; the paper: 0.05.
        tau: How fast one loss gives way to the other, in (0, 1]; the paper: 0.05. Above 1 the
            exponential would win where the pair is mis-ranked.
        weights: As for `dpo`.

    Raises:
        ValueError: tau is not in (0, 1].

    Elsewhere:
        TRL: `discopop`, the same, until exp(-m) overflows and makes it NaN (m below -88 in float32).
        The paper's code (appendix E.6): s = sigmoid(m / beta), that is, tau = beta whatever beta is.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"discopop needs tau in (0, 1]; got {tau}")
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    margins = chosen - rejected
    # s * exp(-m) as one exponential, never above 1: apart, one factor is zero and the other infinite.
    exponential = torch.exp(F.logsigmoid(margins / tau) - margins)
    share = (margins / tau).sigmoid()
    logistic = -F.logsigmoid(margins)
    slope = (
        share * (1 - share) / tau * logistic
        + (1 - share) * (-margins).sigmoid()
        - exponential * ((1 - share) / tau - 1)
    )
    return pair_total(
        (1 - share) * logistic + exponential,
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
        importance_weight=slope,
    )
