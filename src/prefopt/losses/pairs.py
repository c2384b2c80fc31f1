"""What the objectives over pairs share: the expected loss under an uncertain label, and the metrics."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.losses.total import LossTotal

__all__ = [
    "bounded_expm1",
    "bradley_terry",
    "expected_loss",
    "implicit_reward",
    "log1mexp",
    "pair_total",
    "smoothed",
    "token_mean",
]

# Where e^x stops following the exponential: far above any useful value, and still finite in float32
# when multiplied by 1e4 and squared in a gradient norm.
EXPM1_BOUND = 40.0


def implicit_reward(
    beta: float, policy: Float[Tensor, " pairs"], reference: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """beta * (log pi(y|x) - log pi_ref(y|x)); the reference is a constant."""
    return beta * (policy - reference.detach())


def bradley_terry(
    *,
    rewards: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    policy: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    label_smoothing: float,
    soft_labels: Float[Tensor, " pairs"] | None,
    weights: Float[Tensor, " pairs"] | None,
) -> LossTotal:
    """-p * log sigmoid(m) - (1 - p) * log sigmoid(-m), m the margin of rewards (chosen, then rejected).

    Its importance weight is sigmoid(-m) - (1 - p): what pulls the margin up less what pulls it down.
    """
    margins = rewards[0] - rewards[1]
    return pair_total(
        expected_loss(lambda m: -F.logsigmoid(m), margins, label_smoothing, soft_labels),
        rewards=rewards,
        policy=policy,
        weights=weights,
        importance_weight=torch.sigmoid(-margins) - (1 - smoothed(label_smoothing, soft_labels)),
    )


def expected_loss(
    loss: Callable[[Tensor], Tensor],
    margins: Float[Tensor, " pairs"],
    label_smoothing: float,
    soft_labels: Float[Tensor, " pairs"] | None,
) -> Float[Tensor, " pairs"]:
    """p * loss(m) + (1 - p) * loss(-m), with p the probability that the chosen completion is the better.

    Args:
        loss: Of a margin, as if the label were certain.
        margins: Antisymmetric in the two completions: swapping them negates it.
        label_smoothing: eps; labels are wrong with this probability whatever `soft_labels` says.
        soft_labels: A judge's probability that chosen is better; without it 1.
    """
    if soft_labels is None and label_smoothing == 0:
        return loss(margins)
    right = smoothed(label_smoothing, soft_labels)
    return right * loss(margins) + (1 - right) * loss(-margins)


def smoothed(label_smoothing: float, soft_labels: Float[Tensor, " pairs"] | None) -> float | Float[Tensor, " pairs"]:
    """The probability that chosen is better, after eps of the labels were flipped.

    Raises:
        ValueError: eps is not in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is the share of wrong labels, in [0, 0.5); got {label_smoothing}")
    if soft_labels is None:
        return 1 - label_smoothing
    return label_smoothing + (1 - 2 * label_smoothing) * soft_labels


def pair_total(
    losses: Float[Tensor, " pairs"],
    *,
    rewards: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    policy: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    weights: Float[Tensor, " pairs"] | None,
    importance_weight: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Losses times weights, counted in pairs, with the metrics everybody's dashboards know.

    Args:
        rewards: Chosen and rejected: what the loss compares, in the loss's own units.
        policy: Chosen and rejected: log-probabilities summed over tokens.
        importance_weight: -d loss / d margin, the margin being that of `rewards`: how hard the gradient
            pulls the pair apart, beside beta. Only for losses of the margin alone; before `weights`.
    """
    chosen, rejected = (r.detach() for r in rewards)
    margins = chosen - rejected
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": 0.5 * (1 + margins.sign()),
        "logps/chosen": policy[0].detach(),
        "logps/rejected": policy[1].detach(),
    }
    if importance_weight is not None:
        metrics["importance_weight"] = importance_weight.detach()
    return LossTotal(losses=losses if weights is None else losses * weights, count=len(losses), metrics=metrics)


def token_mean(
    logprob_sum: Float[Tensor, " sequences"], tokens: Int[Tensor, " sequences"]
) -> Float[Tensor, " sequences"]:
    """Per token; an empty completion has a sum of 0 and a mean of 0."""
    return logprob_sum / tokens.clamp(min=1)


def bounded_expm1(x: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
    """e^x - 1 up to x = 40 and its tangent beyond, so that neither value nor gradient overflows.

    A clamp would be finite too, but with gradient zero exactly where the pull should be strongest.
    """
    # The tangent is added by relu: as (x - capped) its gradient would be lost in a difference of e^40s.
    return torch.expm1(x.clamp(max=EXPM1_BOUND)) + math.exp(EXPM1_BOUND) * F.relu(x - EXPM1_BOUND)


def log1mexp(x: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
    """log(1 - e^x) for x <= 0, accurate at both ends (Maechler 2012); at x = 0 as at -machine epsilon.

    Each branch is evaluated inside its own domain, so that the unused one cannot make the gradient NaN.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    inside = torch.full_like(x, -math.log(2))
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, inside))),
        torch.log1p(-torch.exp(torch.where(near, inside, x))),
    )
