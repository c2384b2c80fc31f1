"""Losses that compare the batch's distributions, sorted, instead of pair with pair (optimal transport).

These alone are not sums over pairs: a row's loss depends on its neighbours. Micro-batches and ranks that
see part of a step's batch sort that part, so the result changes with how the batch is cut, and approaches
the paper's as the part grows. The order of rows changes nothing. A weight would belong to a row and the
loss to a rank in the order, so there are no weights and no soft labels.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.losses.pairs import expected_loss, implicit_reward, pair_total
from prefopt.losses.total import LossTotal

__all__ = ["aot", "aot_unpaired"]


def aot(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.0,
) -> LossTotal:
    """The policy's margins, as a distribution, shall lie above the reference's at every quantile.

    Melnyk et al. 2024 (AOT, arXiv 2406.05882, section 3, paired).

        u_(i) = i-th smallest over the batch of log pi(y_w|x) - log pi(y_l|x)
        v_(i) = i-th smallest over the batch of log pi_ref(y_w|x) - log pi_ref(y_l|x)
        loss  = -(1 - eps) * log sigmoid(beta * (u_(i) - v_(i))) - eps * log sigmoid(-beta * (u_(i) - v_(i)))

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `dpo`. All of a
            step's pairs must be here at once for the paper's loss.
        beta: As for `dpo`.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        One loss per quantile, smallest first; the metrics are per pair, in the rows' order.

    Elsewhere:
        TRL: `aot`, the same; it too sorts within one device's micro-batch.
    """
    policy = (policy_chosen - policy_rejected).sort().values
    reference = (reference_chosen - reference_rejected).detach().sort().values
    return _quantiles(
        beta * (policy - reference),
        label_smoothing=label_smoothing,
        rewards=(
            implicit_reward(beta, policy_chosen, reference_chosen),
            implicit_reward(beta, policy_rejected, reference_rejected),
        ),
        policy=(policy_chosen, policy_rejected),
    )


def aot_unpaired(
    *,
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float = 0.0,
) -> LossTotal:
    """Chosen rewards, as a distribution, shall lie above rejected ones: who was paired with whom is unused.

    Melnyk et al. 2024 (AOT, arXiv 2406.05882, section 3, unpaired).

        u_(i) = i-th smallest over the batch of r(y_w), r as for `dpo`
        v_(i) = i-th smallest over the batch of r(y_l)
        loss  = -(1 - eps) * log sigmoid(u_(i) - v_(i)) - eps * log sigmoid(v_(i) - u_(i))

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: As for `aot`.
        beta: As for `dpo`.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        As for `aot`.

    Elsewhere:
        TRL: `aot_unpaired`, the same; it too sorts within one device's micro-batch.
    """
    chosen = implicit_reward(beta, policy_chosen, reference_chosen)
    rejected = implicit_reward(beta, policy_rejected, reference_rejected)
    return _quantiles(
        chosen.sort().values - rejected.sort().values,
        label_smoothing=label_smoothing,
        rewards=(chosen, rejected),
        policy=(policy_chosen, policy_rejected),
    )


def _quantiles(
    margins: Float[Tensor, " pairs"],
    *,
    label_smoothing: float,
    rewards: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    policy: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
) -> LossTotal:
    losses = expected_loss(lambda m: -F.logsigmoid(m), margins, label_smoothing, None)
    return pair_total(losses, rewards=rewards, policy=policy, weights=None)
