"""Objectives over single completions, each marked desirable or not: KTO and BCO."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from prefopt.losses.total import LossTotal

__all__ = ["bco", "kto", "kto_kl"]


def kto(
    *,
    policy: Float[Tensor, " rows"],
    reference: Float[Tensor, " rows"],
    desirable: Bool[Tensor, " rows"],
    kl: Float[Tensor, ""] | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    soft_labels: Float[Tensor, " rows"] | None = None,
    weights: Float[Tensor, " rows"] | None = None,
) -> LossTotal:
    """For thumbs up and down without pairs; bounded, so that hopeless or mislabelled rows stop pulling.

    Ethayarajh et al. 2024 (KTO, arXiv 2402.01306, equation 8; 7 in its first version).

        r    = log pi(y|x) - log pi_ref(y|x)
        loss = desirable_weight * (1 - sigmoid(beta * (r - kl)))      where y is desirable
        loss = undesirable_weight * (1 - sigmoid(beta * (kl - r)))    where it is not

    Args:
        policy: Log-probability under the policy, SUMMED over completion tokens, in nats.
        reference: Likewise under the reference; a constant.
        desirable: Whether the completion is wanted.
        kl: The reference point z_0, a constant in nats: `kto_kl` over the whole step.
        beta: Aversion to risk, and strength of the pull to the reference. The paper: 0.1; less for large
            models after fine-tuning, more for small ones without.
        desirable_weight, undesirable_weight: lambda_D and lambda_U. The paper: 1; if one kind is rarer,
            such that lambda_D * desirable rows is 1 to 1.5 times lambda_U * undesirable rows.
        soft_labels: A judge's probability that `desirable` says right, in [0, 1]; without it 1.
        weights: Multiplies a row's loss. The count stays the number of rows.

    Returns:
        Losses and count in rows; metrics per row: `rewards/mean` = beta * r, `rewards/margins`, how far
        it lies on the right side of beta * kl, `rewards/accuracies`, whether it does (a tie counts
        half), `importance_weight`, the pull to the right side, `kl/mismatched` and
        `logps/completion`.

    Elsewhere:
        TRL: `KTOTrainer`, `loss_type="kto"`, the same, with the kl of each micro-batch by itself (so
        accumulation changes it) over the processes. The authors' code: the same; it may also divide
        rewards by their lengths. OpenRLHF: the same, and a variant for balanced batches that takes the
        kl from the rows of the other kind, with gradient.
    """
    rewards = beta * (policy - reference.detach())
    point = kl.detach() if isinstance(kl, Tensor) else kl
    return _unpaired_total(
        lambda margins: torch.sigmoid(-margins),
        slope=lambda margins: torch.sigmoid(margins) * torch.sigmoid(-margins),
        rewards=rewards,
        threshold=beta * point,
        desirable=desirable,
        row_weights=(desirable_weight, undesirable_weight),
        soft_labels=soft_labels,
        weights=weights,
        metrics={"kl/mismatched": torch.zeros_like(rewards).detach() + point, "logps/completion": policy.detach()},
    )


def kto_kl(*, policy: Float[Tensor, " mismatched"], reference: Float[Tensor, " mismatched"]) -> Float[Tensor, ""]:
    """KTO's reference point: how far the policy has moved, from completions of other rows' prompts.

    Ethayarajh et al. 2024 (KTO, arXiv 2402.01306, section 4). Biased, but cheap; a constant, no gradient.

        kl = max(0, mean over rows i of log pi(y_j|x_i) - log pi_ref(y_j|x_i)),  j = i + 1, cyclically

    Args:
        policy, reference: As for `kto`, of each prompt with the next row's completion. Pass the whole
            step's, over all micro-batches and processes: the mean of several clamped means is another.

    Returns:
        A scalar in nats, at least 0.

    Raises:
        ValueError: no rows.

    Elsewhere:
        TRL: `KTOTrainer` takes it over a micro-batch, gathered over processes. OpenRLHF: likewise.
    """
    if not len(policy):
        raise ValueError("kto_kl is a mean over mismatched completions; got none")
    return (policy - reference).detach().mean().clamp(min=0)


def bco(
    *,
    policy: Float[Tensor, " rows"],
    reference: Float[Tensor, " rows"],
    desirable: Bool[Tensor, " rows"],
    reward_shift: Float[Tensor, ""] | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    soft_labels: Float[Tensor, " rows"] | None = None,
    weights: Float[Tensor, " rows"] | None = None,
) -> LossTotal:
    """Thumbs up and down as a classification of single completions, whose loss bounds DPO's from above.

    Jung et al. 2024 (BCO, arXiv 2404.04656). The paper's weights for thumbs-down prompts that differ
    from thumbs-up ones (underlying distribution matching: a density ratio from a classifier of prompt
    embeddings) are not computed here; given by somebody, they go into `weights`.

        r    = beta * (log pi(y|x) - log pi_ref(y|x))
        loss = -desirable_weight * log sigmoid(r - delta)         where y is desirable
        loss = -undesirable_weight * log sigmoid(delta - r)       where it is not

    Args:
        policy, reference, desirable: As for `kto`.
        reward_shift: delta, a constant: the running mean, over the steps before, of the two kinds' mean
            rewards, (mean where desirable + mean where not) / 2; 0 to begin with.
        beta: As for `dpo`.
        desirable_weight, undesirable_weight: The paper averages each kind by itself, so here they are
            all rows / (2 * rows of that kind); 1 where both kinds are equally many.
        soft_labels, weights: As for `kto`.

    Returns:
        As for `kto`, without `kl/mismatched`.

    Elsewhere:
        TRL: none in 1.16; its `bco_pair` is this on both completions of a pair, with delta left at 0.
        Older releases have `BCOTrainer`, whose delta is the running mean over rows of either kind, and
        already holds the batch it is used on. LLaMA-Factory: `bco_pair`, with such a delta.
    """
    rewards = beta * (policy - reference.detach())
    return _unpaired_total(
        lambda margins: -F.logsigmoid(margins),
        slope=lambda margins: torch.sigmoid(-margins),
        rewards=rewards,
        threshold=reward_shift.detach() if isinstance(reward_shift, Tensor) else reward_shift,
        desirable=desirable,
        row_weights=(desirable_weight, undesirable_weight),
        soft_labels=soft_labels,
        weights=weights,
        metrics={"logps/completion": policy.detach()},
    )


def _unpaired_total(
    loss: Callable[[Tensor], Tensor],
    *,
    slope: Callable[[Tensor], Tensor],
    rewards: Float[Tensor, " rows"],
    threshold: Float[Tensor, ""] | float,
    desirable: Bool[Tensor, " rows"],
    row_weights: tuple[float, float],
    soft_labels: Float[Tensor, " rows"] | None,
    weights: Float[Tensor, " rows"] | None,
    metrics: dict[str, Float[Tensor, " rows"]],
) -> LossTotal:
    """A falling loss of how far each reward lies on its right side of the threshold; `slope` is -loss'."""
    wanted = desirable.to(rewards.dtype)
    margins = (2 * wanted - 1) * (rewards - threshold)
    mine = row_weights[0] * wanted + row_weights[1] * (1 - wanted)
    losses, pull = mine * loss(margins), mine * slope(margins.detach())
    if soft_labels is not None:
        other = row_weights[1] * wanted + row_weights[0] * (1 - wanted)
        losses = soft_labels * losses + (1 - soft_labels) * other * loss(-margins)
        pull = soft_labels * pull - (1 - soft_labels) * other * slope(-margins.detach())
    return LossTotal(
        losses=losses if weights is None else losses * weights,
        count=len(losses),
        metrics={
            "rewards/mean": rewards.detach(),
            "rewards/margins": margins.detach(),
            "rewards/accuracies": 0.5 * (1 + margins.detach().sign()),
            "importance_weight": pull,
            **metrics,
        },
    )
