"""Likelihood objectives: supervised fine-tuning."""

from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.total import LossTotal

__all__ = ["negative_log_likelihood"]


def negative_log_likelihood(
    *,
    logprob_sum: Float[Tensor, " sequences"],
    token_counts: Int[Tensor, " sequences"],
    weights: Float[Tensor, " sequences"] | None = None,
) -> LossTotal:
    """-log p(completion | prompt), in nats, counted per token: total / count is the token mean.

    Args:
        logprob_sum: Log-probability summed over each completion's trainable tokens.
        token_counts: How many tokens each sum holds.
        weights: Multiplies a sequence's loss; the count stays the number of tokens.
    """
    losses = -logprob_sum if weights is None else -logprob_sum * weights
    return LossTotal(losses=losses, count=token_counts.sum())
