"""Likelihood objectives: supervised fine-tuning, Preferred-FT, and the unlikelihood baseline."""

from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.pairs import pair_total, token_mean
from prefopt.losses.total import LossTotal

__all__ = ["negative_log_likelihood", "sequence_mean_nll", "unlikelihood"]


def negative_log_likelihood(
    *,
    logprob_sum: Float[Tensor, " sequences"],
    token_counts: Int[Tensor, " sequences"],
    weights: Float[Tensor, " sequences"] | None = None,
) -> LossTotal:
    """Supervised fine-tuning; on the chosen completions of pairs it is the baseline Preferred-FT.

    Rafailov et al. 2023 (arXiv 2305.18290, section 6) for Preferred-FT. In nats, counted per token:
    total / count is the token mean.

        loss = -log pi(y|x)

    Args:
        logprob_sum: Log-probability summed over each completion's trainable tokens.
        token_counts: How many tokens each sum holds.
        weights: Multiplies a sequence's loss; the count stays the number of tokens.

    Elsewhere:
        TRL: `SFTTrainer`, the same. `DPOTrainer` with `loss_type="sft"` takes each micro-batch's own
        mean, so that there accumulation changes the loss.
    """
    losses = -logprob_sum if weights is None else -logprob_sum * weights
    return LossTotal(losses=losses, count=token_counts.sum())


def sequence_mean_nll(
    *,
    logprob_sum: Float[Tensor, " sequences"],
    token_counts: Int[Tensor, " sequences"],
    weights: Float[Tensor, " sequences"] | None = None,
) -> LossTotal:
    """The likelihood term of sums such as RPO: every completion weighs the same, whatever its length.

    Pang et al. 2024 (iterative RPO, arXiv 2404.19733, section 2): the term beside DPO on the chosen
    completion. Counted per sequence, so that it adds to losses over pairs (`weighted_sum`).

        loss = -log pi(y|x) / |y|

    Args:
        logprob_sum: Log-probability summed over each completion's trainable tokens.
        token_counts: How many tokens each sum holds.
        weights: Multiplies a sequence's loss; the count stays the number of sequences.

    Elsewhere:
        TRL: `sft` among the losses of `DPOTrainer` is a mean over the micro-batch's tokens, so long
        completions weigh more there.
        OpenRLHF: the term `nll_loss_coef` adds to DPO is the mean over pairs, as here.
    """
    means = token_mean(-logprob_sum, token_counts)
    return LossTotal(losses=means if weights is None else means * weights, count=len(means))


def unlikelihood(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    alpha: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """A baseline of the DPO paper: raise the chosen likelihood, lower the rejected one, without limit.

    Rafailov et al. 2023 (arXiv 2305.18290, section 6). Nothing stops the second term, so the model may
    degenerate: the paper shows it does on dialogue and summarisation, and uses it for sentiment only.

        loss = -log pi(y_w|x) + alpha * log pi(y_l|x)

    Args:
        policy_chosen, policy_rejected: As for `dpo`.
        alpha: Weight of the second term, in [0, 1]; the paper tries 0.05, 0.1, 0.5 and 1.
        weights: As for `dpo`.

    Elsewhere:
        TRL: none. Welleck et al. 2019 (arXiv 1908.04319) call -log(1 - p) per token unlikelihood; the
        DPO paper minimises log p itself, and so does this.
    """
    return pair_total(
        -policy_chosen + alpha * policy_rejected,
        rewards=(policy_chosen, policy_rejected),
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )
