"""DPO against longer and longer completions: normalised by length, regularised by it, desensitised to it."""

from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.pairs import bradley_terry, implicit_reward, token_mean
from prefopt.losses.total import LossTotal

__all__ = ["ld_dpo", "length_normalized_dpo", "r_dpo"]


def length_normalized_dpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    rejected_tokens: Int[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """DPO on rewards per token, so that length by itself earns nothing.

    Lambert et al. 2024 (Tulu 3, arXiv 2411.15124, length-normalized DPO).

        r(y) = beta * (log pi(y|x) - log pi_ref(y|x)) / |y|,  m = r(y_w) - r(y_l)
        loss = -log sigmoid(m)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        chosen_tokens, rejected_tokens: |y|, the tokens that each sum holds.
        beta: Larger than for `dpo`, since log-ratios per token are small; the paper: 5.
        label_smoothing, soft_labels, weights: As for `dpo`.

    Elsewhere:
        TRL: `sigmoid_norm`, the same. open-instruct: `dpo_norm`.
    """
    return bradley_terry(
        rewards=(
            token_mean(implicit_reward(beta, policy_chosen, reference_chosen), chosen_tokens),
            token_mean(implicit_reward(beta, policy_rejected, reference_rejected), rejected_tokens),
        ),
        policy=(policy_chosen, policy_rejected),
        label_smoothing=label_smoothing,
        soft_labels=soft_labels,
        weights=weights,
    )


def r_dpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    rejected_tokens: Int[Tensor, " pairs"],
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """DPO for the reward less a price per token: pairs that length explains pull less.

    Park et al. 2024 (R-DPO, arXiv 2403.19159). Where the reward maximised is r(y) - alpha * |y|, the r
    that the labels speak of is the implicit reward PLUS alpha * |y|.

        r(y) = beta * (log pi(y|x) - log pi_ref(y|x)) + alpha * |y|,  m = r(y_w) - r(y_l)
        loss = -log sigmoid(m)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        chosen_tokens, rejected_tokens: |y|, the tokens of each completion.
        beta: As for `dpo`.
        alpha: Price of a token, in units of reward; 0.0 is `dpo`.
        label_smoothing, soft_labels, weights: As for `dpo`.

    Returns:
        As for `dpo`; the rewards include alpha * |y|, as the margin does.

    Elsewhere:
        TRL: none. OpenRLHF: none.
    """
    return bradley_terry(
        rewards=(
            implicit_reward(beta, policy_chosen, reference_chosen) + alpha * chosen_tokens.to(policy_chosen.dtype),
            implicit_reward(beta, policy_rejected, reference_rejected)
            + alpha * rejected_tokens.to(policy_rejected.dtype),
        ),
        policy=(policy_chosen, policy_rejected),
        label_smoothing=label_smoothing,
        soft_labels=soft_labels,
        weights=weights,
    )


def ld_dpo(
    *,
    policy_chosen_head: Float[Tensor, " pairs"],
    policy_chosen_tail: Float[Tensor, " pairs"],
    policy_rejected_head: Float[Tensor, " pairs"],
    policy_rejected_tail: Float[Tensor, " pairs"],
    reference_chosen_head: Float[Tensor, " pairs"],
    reference_chosen_tail: Float[Tensor, " pairs"],
    reference_rejected_head: Float[Tensor, " pairs"],
    reference_rejected_tail: Float[Tensor, " pairs"],
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """DPO that hears less of what the longer completion says after the shorter one has ended.

    Liu et al. 2024 (LD-DPO, arXiv 2409.06411). With n = min(|y_w|, |y_l|), a completion's head is its
    first n tokens and its tail the rest; the shorter completion's tail is 0.

        l(y) = log pi(head) + alpha * log pi(tail), and l_ref(y) likewise
        r(y) = beta * (l(y) - l_ref(y)),  m = r(y_w) - r(y_l)
        loss = -log sigmoid(m)

    Args:
        policy_chosen_head, policy_chosen_tail, policy_rejected_head, policy_rejected_tail:
            Log-probability under the policy, summed over the head's or the tail's tokens, in nats.
        reference_chosen_head, reference_chosen_tail, reference_rejected_head, reference_rejected_tail:
            Likewise under the reference; constants.
        beta: As for `dpo`.
        alpha: In [0, 1]: 1.0 is `dpo`, 0.0 cuts both at the shorter one's length. The paper tunes it
            for each model.
        label_smoothing, soft_labels, weights: As for `dpo`.

    Returns:
        As for `dpo`; `logps/...` are of whole completions, heads and tails in full.

    Raises:
        ValueError: alpha is not in [0, 1].

    Elsewhere:
        TRL: `ld_alpha`, the same beside `sigmoid`. There it also changes every other `loss_type`, and
        reference log-probabilities that were stored for another `ld_alpha` are used as they are.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the share of the tail that counts, in [0, 1]; got {alpha}")
    return bradley_terry(
        rewards=(
            implicit_reward(beta, policy_chosen_head, reference_chosen_head)
            + alpha * implicit_reward(beta, policy_chosen_tail, reference_chosen_tail),
            implicit_reward(beta, policy_rejected_head, reference_rejected_head)
            + alpha * implicit_reward(beta, policy_rejected_tail, reference_rejected_tail),
        ),
        policy=(policy_chosen_head + policy_chosen_tail, policy_rejected_head + policy_rejected_tail),
        label_smoothing=label_smoothing,
        soft_labels=soft_labels,
        weights=weights,
    )
