"""What the next-token distributions say about given targets, besides their log-probabilities.

Forward only, exact over the whole vocabulary, from the same pieces of logits as the head's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.model.head import Head, logit_blocks

__all__ = ["TargetStatistics", "target_statistics"]


@dataclass(frozen=True)
class TargetStatistics:
    """Per target; None where it was not asked for.

    Attributes:
        logprob: log p(target), nats.
        entropy: Of the whole distribution, nats.
        rank: How many tokens have a strictly higher logit than the target: 0 for the likeliest,
            the same for tokens that tie.
        top: The token of the highest logit; of tied ones, one of them.
        kl: KL(p || q) to the other head's distribution, nats.
        collision: log sum over tokens of p(token)^2: that two draws coincide, nats.
    """

    logprob: Float[Tensor, " targets"]
    entropy: Float[Tensor, " targets"] | None
    rank: Int[Tensor, " targets"] | None
    top: Int[Tensor, " targets"] | None
    kl: Float[Tensor, " targets"] | None
    collision: Float[Tensor, " targets"] | None


@torch.no_grad()
def target_statistics(
    head: Head,
    hidden: Float[Tensor, "targets hidden"],
    targets: Int[Tensor, " targets"],
    *,
    entropy: bool = False,
    rank: bool = False,
    top: bool = False,
    against: tuple[Head, Float[Tensor, "targets others"]] | None = None,
    collision: bool = False,
) -> TargetStatistics:
    """Log-probabilities and whatever else is asked for, in one pass.

    Args:
        against: Head and hidden states of q; the vocabulary is the same.
    """
    others = logit_blocks(*against) if against is not None else None
    found: dict[str, list[Tensor]] = {name: [] for name in ("logprob", "entropy", "rank", "top", "kl", "collision")}
    for rows, logits in logit_blocks(head, hidden):
        at = targets[rows, None]
        highest, likeliest = logits.max(dim=1, keepdim=True) if top else (logits.amax(dim=1, keepdim=True), None)
        picked = logits.gather(1, at)
        if likeliest is not None:
            found["top"].append(likeliest[:, 0])
        if rank:
            found["rank"].append((logits > picked).sum(dim=1))
        logits.sub_(highest)
        weights = logits.exp()
        total = weights.sum(dim=1)
        found["logprob"].append((picked - highest)[:, 0] - total.log())
        if collision:
            found["collision"].append(_dot(weights, weights).log() - 2 * total.log())
        if entropy:
            found["entropy"].append(total.log() - _dot(weights, logits) / total)
        if others is not None:
            theirs = next(others)[1]
            theirs.sub_(theirs.amax(dim=1, keepdim=True))
            logits.sub_(theirs)  # the log-ratio, up to the totals
            ratio = theirs.exp_().sum(dim=1).log() - total.log()
            found["kl"].append(_dot(weights, logits) / total + ratio)

    def joined(name: str, asked: bool, empty: Tensor) -> Tensor | None:
        return torch.cat(found[name] or [empty]) if asked else None

    nothing, nobody = hidden.new_zeros(0, dtype=torch.float32), targets[:0]
    return TargetStatistics(
        logprob=torch.cat(found["logprob"] or [nothing]),
        entropy=joined("entropy", entropy, nothing),
        rank=joined("rank", rank, nobody),
        top=joined("top", top, nobody),
        kl=joined("kl", against is not None, nothing),
        collision=joined("collision", collision, nothing),
    )


def _dot(left: Float[Tensor, "rows vocab"], right: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Row by row, without a third array of that size."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]
