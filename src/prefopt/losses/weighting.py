"""Weights for pairs that the policy itself decides."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.pairs import token_mean

__all__ = ["wpo_weights"]


def wpo_weights(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    chosen_log_collision: Float[Tensor, " pairs"],
    rejected_log_collision: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    rejected_tokens: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Other models' pairs as if they were the policy's own: unlikely completions weigh little.

    Zhou et al. 2024 (WPO, arXiv 2406.11827, equation 2, sampled alignment). Goes to the `weights` of
    any loss over pairs. Completions sampled from the policy weigh about 1, for any temperature of it.

        w(y)   = exp((1 / |y|) * sum over t of log(pi(y_t) / sum over v of pi(v)^2))
        weight = w(y_w) * w(y_l)

    Args:
        policy_chosen, policy_rejected: As for `dpo`.
        chosen_log_collision, rejected_log_collision: Summed over the same tokens, the log of the
            probability that two draws of the policy's next token coincide: log sum over v of pi(v)^2.
        chosen_tokens, rejected_tokens: |y|, the tokens that each sum holds.

    Returns:
        Constants, without gradient. A token likelier than the typical draw makes w exceed 1; per
        completion it is never above the size of the vocabulary.

    Elsewhere:
        TRL: `use_weighting`, the same since it no longer cuts weights at 1 (1.16); older releases do.
        The paper's other form, greedy alignment, divides by the largest probability; not here.
    """
    chosen = token_mean(policy_chosen - chosen_log_collision, chosen_tokens)
    rejected = token_mean(policy_rejected - rejected_log_collision, rejected_tokens)
    return torch.exp(chosen + rejected).detach()
