"""Objectives over pairs that need no reference model: ORPO, SimPO, CPO, AlphaPO."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.pairs import bounded_expm1, expected_loss, log1mexp, pair_total, smoothed, token_mean
from prefopt.losses.total import LossTotal

__all__ = ["alpha_po", "cpo", "orpo", "simpo"]


def orpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    rejected_tokens: Int[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Fine-tuning and alignment in one stage, from a base model and without a reference.

    Hong, Lee and Thorne 2024 (ORPO, arXiv 2403.07691, equations 3, 4, 6 and 7). The likelihood term
    comes out of the same log-probabilities, so it costs nothing.

        log P(y)    = log pi(y|x) / |y|
        log odds(y) = log P(y) - log(1 - P(y))
        m           = log odds(y_w) - log odds(y_l)
        loss        = -log P(y_w) - beta * log sigmoid(m)

    Args:
        policy_chosen, policy_rejected: As for `dpo`.
        chosen_tokens, rejected_tokens: |y|, the tokens that each sum holds.
        beta: The paper's lambda: weight of the odds ratio. The paper: 0.1 for Mistral, 0.2 for Llama 2.
        label_smoothing, soft_labels: As for `dpo`, in the second term; the first is the chosen's anyway.
        weights: Multiplies both terms of a pair.

    Returns:
        As for `dpo`, without `importance_weight`; rewards are log odds.

    Elsewhere:
        TRL: `ORPOTrainer`, experimental, whose `beta` this is; the odds ratio is the same. Its likelihood
        term takes in the prompt's tokens, and is a mean over the batch's tokens, not over pairs. At
        P(y) = 1 its log odds are infinite, and the gradient NaN.
        LLaMA-Factory: `orpo`, the same loss, by log1p(-exp(.)), which loses all digits near P(y) = 1.
        The authors' code: `alpha` for beta; its likelihood term takes in the prompt's tokens too, unless
        `disable_prompt_loss`, and is a mean over the batch's tokens.
    """
    means = token_mean(policy_chosen, chosen_tokens), token_mean(policy_rejected, rejected_tokens)
    rewards = means[0] - log1mexp(means[0]), means[1] - log1mexp(means[1])
    odds_ratio = _logistic(rewards[0] - rewards[1], 0.0, label_smoothing, soft_labels)
    return pair_total(
        beta * odds_ratio - means[0],
        rewards=rewards,
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )


def simpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    rejected_tokens: Int[Tensor, " pairs"],
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """No reference and no bonus for length: the reward is the likelihood per token, as decoding ranks.

    Meng, Xia and Chen 2024 (SimPO, arXiv 2405.14734, equation 6). Nothing holds the model to where it
    started but a small learning rate: the paper searches 3e-7 to 1e-6.

        r(y) = beta * log pi(y|x) / |y|,  m = r(y_w) - r(y_l)
        loss = -log sigmoid(m - gamma)

    Args:
        policy_chosen, policy_rejected: As for `dpo`.
        chosen_tokens, rejected_tokens: |y|, the tokens that each sum holds.
        beta: Scale of the reward, much larger than DPO's. The paper: 2 to 2.5; its authors later, up to 10.
        gamma: The margin wanted, in the reward's units. The paper: gamma / beta from 0.1 to 0.8; start at 0.5.
        label_smoothing, soft_labels: As for `dpo`; in a flipped pair the margin is wanted the other way.
        weights: As for `dpo`.

    Elsewhere:
        TRL: `CPOTrainer`, experimental, `loss_type="simpo"` with `simpo_gamma`; the same loss. Beside it
        stands CPO's likelihood term unless `cpo_alpha=0`, and beta is 0.1 unless set. With
        `label_smoothing`, its flipped pair is not asked for gamma but let off it: log sigmoid(gamma - m).
        The authors' code: `gamma_beta_ratio` is gamma / beta; label smoothing as TRL's.
        LLaMA-Factory: `simpo`, the same.
    """
    return _target_margin(
        rewards=(
            beta * token_mean(policy_chosen, chosen_tokens),
            beta * token_mean(policy_rejected, rejected_tokens),
        ),
        policy=(policy_chosen, policy_rejected),
        gamma=gamma,
        label_smoothing=label_smoothing,
        soft_labels=soft_labels,
        weights=weights,
    )


def alpha_po(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    rejected_tokens: Int[Tensor, " pairs"],
    beta: float,
    gamma: float,
    alpha: float,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """SimPO with a reward of another shape, to keep the chosen completion's likelihood from falling.

    Gupta et al. 2025 (AlphaPO, arXiv 2501.03884). alpha = 0 is `simpo`, to the last bit.

        P(y) = exp(log pi(y|x) / |y|)
        r(y) = beta * (1 - P(y)^-alpha) / alpha,  m = r(y_w) - r(y_l)
        loss = -log sigmoid(m - gamma)

    Where P(y)^-alpha passes e^40 it goes on along its tangent, so that nothing overflows.

    Args:
        policy_chosen, policy_rejected, chosen_tokens, rejected_tokens, beta, gamma: As for `simpo`.
        alpha: Shape of the reward: above 0 it falls faster than the logarithm where a completion is
            unlikely, below 0 slower. The paper finds small positive values best.
        label_smoothing, soft_labels, weights: As for `simpo`.

    Elsewhere:
        TRL: `CPOTrainer`, experimental, `loss_type="alphapo"` with `alpha`; the same where it is finite.
        It goes through P(y) itself, which is 0 in float32 below -103 nats a token, and the loss NaN.
        The authors published no code.
    """
    return _target_margin(
        rewards=(
            beta * _shaped(token_mean(policy_chosen, chosen_tokens), alpha),
            beta * _shaped(token_mean(policy_rejected, rejected_tokens), alpha),
        ),
        policy=(policy_chosen, policy_rejected),
        gamma=gamma,
        label_smoothing=label_smoothing,
        soft_labels=soft_labels,
        weights=weights,
    )


def cpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    chosen_tokens: Int[Tensor, " pairs"],
    beta: float,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """DPO without the reference, held by imitating the chosen completion; made for translation.

    Xu et al. 2024 (CPO, arXiv 2401.08417, equations 3 and 5). As printed the likelihood is summed over
    tokens; its authors' code averages it, and so does this: summed, it would outweigh the first term
    many times over on completions of any length.

        m    = beta * (log pi(y_w|x) - log pi(y_l|x))
        loss = -log sigmoid(m) - nll_weight * log pi(y_w|x) / |y_w|

    Args:
        policy_chosen, policy_rejected: As for `dpo`.
        chosen_tokens: |y_w|, the tokens that the chosen sum holds.
        beta: As for `dpo`. The paper: 0.1.
        nll_weight: Weight of the second term. The paper: 1.
        label_smoothing, soft_labels: As for `dpo`, in the first term; the second is the chosen's anyway.
        weights: Multiplies both terms of a pair.

    Returns:
        As for `dpo`, without `importance_weight`; rewards are beta * log pi(y|x).

    Elsewhere:
        TRL: `CPOTrainer`, experimental, `loss_type="sigmoid"` with `cpo_alpha` for nll_weight; the first
        term is the same, the second a mean over the batch's tokens, not over pairs.
    """
    rewards = beta * policy_chosen, beta * policy_rejected
    preference = _logistic(rewards[0] - rewards[1], 0.0, label_smoothing, soft_labels)
    return pair_total(
        preference - nll_weight * token_mean(policy_chosen, chosen_tokens),
        rewards=rewards,
        policy=(policy_chosen, policy_rejected),
        weights=weights,
    )


def _logistic(
    margins: Float[Tensor, " pairs"],
    gamma: float,
    label_smoothing: float,
    soft_labels: Float[Tensor, " pairs"] | None,
) -> Float[Tensor, " pairs"]:
    """-log sigmoid(m - gamma), expected over uncertain labels."""
    return expected_loss(lambda m: -F.logsigmoid(m - gamma), margins, label_smoothing, soft_labels)


def _target_margin(
    *,
    rewards: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    policy: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    gamma: float,
    label_smoothing: float,
    soft_labels: Float[Tensor, " pairs"] | None,
    weights: Float[Tensor, " pairs"] | None,
) -> LossTotal:
    """The logistic loss of rewards that are to be gamma apart."""
    margins = rewards[0] - rewards[1]
    right = smoothed(label_smoothing, soft_labels)
    return pair_total(
        _logistic(margins, gamma, label_smoothing, soft_labels),
        rewards=rewards,
        policy=policy,
        weights=weights,
        importance_weight=right * torch.sigmoid(gamma - margins) - (1 - right) * torch.sigmoid(gamma + margins),
    )


def _shaped(mean: Float[Tensor, " pairs"], alpha: float) -> Float[Tensor, " pairs"]:
    """(1 - P^-alpha) / alpha of log P, which at alpha = 0 is log P itself."""
    return -bounded_expm1(-alpha * mean) / alpha if alpha else mean
