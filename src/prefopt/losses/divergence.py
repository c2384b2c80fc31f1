"""DPO that keeps the policy near the reference by another divergence than the reverse KL."""

import math
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.losses.pairs import bounded_expm1, bradley_terry
from prefopt.losses.total import LossTotal

__all__ = ["Divergence", "f_dpo"]

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


def f_dpo(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    divergence: Divergence,
    alpha: float | None = None,
    label_smoothing: float = 0.0,
    soft_labels: Float[Tensor, " pairs"] | None = None,
    weights: Float[Tensor, " pairs"] | None = None,
) -> LossTotal:
    """Trades reward for diversity differently: forward KL covers the reference, reverse KL seeks a mode.

    Wang et al. 2023 (f-DPO, arXiv 2309.16240, table 1). With u = pi(y|x) / pi_ref(y|x), up to a
    constant that the margin cancels, chosen so that equal models have reward 0:

        f'(u) = log u                (reverse_kl: `dpo`)
        f'(u) = 1 - 1 / u            (forward_kl)
        f'(u) = log(2 * u / (1 + u)) (jensen_shannon)
        f'(u) = (1 - u^-alpha) / alpha   (alpha: near 0 the reverse KL, near 1 the forward KL)
        r(y)  = beta * f'(u),  m = r(y_w) - r(y_l)
        loss  = -log sigmoid(m)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`.
        beta: Weight of the divergence; 0.1 as for `dpo`.
        divergence: Which; see the equations.
        alpha: With `alpha`, and only with it: in (0, 1).
        label_smoothing, soft_labels, weights: As for `dpo`.

    Returns:
        As for `dpo`, with r(y) as above. u^-alpha follows its tangent once -alpha * log u passes 40,
        so that losses and gradients stay finite whatever the log-ratio.

    Raises:
        ValueError: alpha without its divergence, or missing, or not in (0, 1).

    Elsewhere:
        TRL: `f_divergence_type`, beside `sigmoid` and others. Its `f_alpha_divergence_coef` is 1 - alpha
        (at its default, 0.5, the two agree), its log-ratios are cut where -alpha * log u passes 80, so
        that the gradient is zero there, and its forward KL overflows to NaN below log u = -88 (float32).
    """
    if (divergence == "alpha") != (alpha is not None):
        raise ValueError(f"alpha goes with divergence='alpha' and with nothing else; got {divergence!r}, {alpha}")
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(f"alpha is between the two KL divergences, in (0, 1); got {alpha}")
    return bradley_terry(
        rewards=(
            beta * _slope(policy_chosen - reference_chosen.detach(), divergence, alpha),
            beta * _slope(policy_rejected - reference_rejected.detach(), divergence, alpha),
        ),
        policy=(policy_chosen, policy_rejected),
        label_smoothing=label_smoothing,
        soft_labels=soft_labels,
        weights=weights,
    )


def _slope(log_ratios: Float[Tensor, " pairs"], divergence: Divergence, alpha: float | None) -> Float[Tensor, " pairs"]:
    """f'(u) of log u, less f'(1)."""
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "jensen_shannon":
        return math.log(2) + F.logsigmoid(log_ratios)
    power = 1.0 if alpha is None else alpha  # the forward KL is the alpha family's end
    return -bounded_expm1(-power * log_ratios) / power
