"""What every objective returns: a sum and a count, so that the step divides once, globally."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LossTotal", "weighted_sum"]


@dataclass(frozen=True)
class LossTotal:
    """Losses of a micro-batch before any division.

    Attributes:
        losses: One per group, differentiable; the step's loss is sum(losses) / global count.
        count: What this micro-batch adds to the global count: pairs for preference objectives,
            tokens for likelihood. Stays on the device where it is computed from a tensor.
        metrics: Per-group values to be averaged over groups for the log, detached.
    """

    losses: Float[Tensor, " groups"]
    count: int | Int[Tensor, ""]
    metrics: dict[str, Float[Tensor, " groups"]] = field(default_factory=dict)


def weighted_sum(terms: Mapping[str, tuple[float, LossTotal]]) -> LossTotal:
    """Several objectives on the same groups, each times its weight.

    Wang et al. 2024 (MPO, arXiv 2411.10442: DPO, BCO and likelihood of the chosen, weights 0.8, 0.2
    and 1) and Pang et al. 2024 (iterative RPO, arXiv 2404.19733: DPO and likelihood, weight 1).

        loss = sum over terms of weight * loss(term)

    The sum is taken before the step's one division, so every term must count the same thing:
    `sequence_mean_nll` goes with losses over pairs, `negative_log_likelihood`, which counts tokens, does not.

    Args:
        terms: Name to (weight, what the objective returned). A metric that several terms have is the
            first one's; each term's own loss is added as `loss/NAME`, before its weight.

    Raises:
        ValueError: no terms, or terms that do not count the same groups.

    Elsewhere:
        TRL: `loss_type=[...]` with `loss_weights`. There each term is averaged by itself, so its `sft`
        is a mean over the batch's tokens; ours is a mean over pairs of each pair's token mean.
    """
    totals = [total for _, total in terms.values()]
    groups = {total.count if isinstance(total.count, int) else None for total in totals}
    if len(groups) != 1 or None in groups:
        raise ValueError(
            "weighted_sum adds objectives that count the same groups, one each (not tokens); "
            f"got {', '.join(terms) or 'no terms'}"
        )
    losses = sum((weight * total.losses for weight, total in terms.values()), totals[0].losses * 0)
    metrics: dict[str, Tensor] = {}
    for name, (_, total) in terms.items():
        metrics = {**total.metrics, **metrics, f"loss/{name}": total.losses.detach()}
    return LossTotal(losses=losses, count=totals[0].count, metrics=metrics)
