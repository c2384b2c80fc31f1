"""Losses without a reference, over single completions, over rankings, and likelihoods: values, gradients, extremes."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.losses import (
    LossTotal,
    alpha_po,
    bco,
    cpo,
    dpo,
    kto,
    kto_kl,
    negative_log_likelihood,
    orpo,
    plackett_luce,
    sequence_mean_nll,
    simpo,
    unlikelihood,
    weighted_sum,
)

Loss = Callable[..., LossTotal]

LOSSES: tuple[Loss, ...] = (
    alpha_po,
    bco,
    cpo,
    kto,
    negative_log_likelihood,
    orpo,
    plackett_luce,
    sequence_mean_nll,
    simpo,
    unlikelihood,
)
OPTIONS = {"beta": 0.7, "gamma": 0.4, "alpha": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.8}
LEARNT = ("policy_chosen", "policy_rejected", "policy", "logprob_sum")


def sums(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def counts(*values: int) -> Tensor:
    return torch.tensor(values)


def random_rows(loss: Loss, rows: int, uncertain: bool = False) -> dict[str, Any]:
    """Every tensor the loss takes, by name: log-probabilities below 0, as they are."""
    g = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {}
    for name in inspect.signature(loss).parameters:
        shape = (rows, 4) if loss is plackett_luce else (rows,)
        if name.startswith(("policy", "reference", "logprob")):
            made[name] = -0.5 - 5 * torch.rand(shape, generator=g, dtype=torch.float64)
        elif "tokens" in name or name == "token_counts":
            made[name] = torch.randint(1, 9, shape, generator=g)
        elif name in ("desirable", "present"):
            made[name] = torch.rand(shape, generator=g) < 0.6
        elif name in ("weights", "soft_labels") and uncertain:
            made[name] = torch.rand(rows, generator=g, dtype=torch.float64)
        elif name in ("kl", "reward_shift"):
            made[name] = torch.tensor(0.3, dtype=torch.float64)
    return made


def options(loss: Loss) -> dict[str, Any]:
    return {name: value for name, value in OPTIONS.items() if name in inspect.signature(loss).parameters}


def taken(rows: dict[str, Any], index: Tensor) -> dict[str, Any]:
    return {name: value[index] if value.ndim else value for name, value in rows.items()}


@pytest.mark.parametrize("uncertain", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss: Loss, uncertain: bool) -> None:
    rows = random_rows(loss, 5, uncertain)
    names = [name for name in rows if name in LEARNT]

    def losses(*values: Tensor) -> Tensor:
        return loss(**{**rows, **dict(zip(names, values, strict=True))}, **options(loss)).losses

    assert torch.autograd.gradcheck(losses, [rows[name].requires_grad_() for name in names])


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_and_the_order_of_rows_change_nothing(loss: Loss) -> None:
    rows = random_rows(loss, 6, uncertain=True)
    whole = loss(**rows, **options(loss))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    parts = [loss(**taken(rows, part), **options(loss)) for part in order.split([1, 3, 2])]
    torch.testing.assert_close(torch.cat([part.losses for part in parts]), whole.losses[order])
    assert sum(int(part.count) for part in parts) == int(whole.count)
    for name, values in whole.metrics.items():
        torch.testing.assert_close(torch.cat([part.metrics[name] for part in parts]), values[order])


@pytest.mark.parametrize("uncertain", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_extremes_stay_finite(loss: Loss, uncertain: bool) -> None:
    rows = {n: v.float() if v.is_floating_point() else v for n, v in random_rows(loss, 9, uncertain).items()}
    for name in rows:
        if name.startswith("reference"):
            rows[name] = torch.zeros_like(rows[name])
    ends = torch.tensor([1e4, 0.0, -1e4])
    learnt = [name for name in rows if name in LEARNT]
    values = (ends.repeat_interleave(3), ends.repeat(3))
    for name, value in zip(learnt, values, strict=False):
        rows[name] = value.requires_grad_()
    if loss is plackett_luce:
        rows["policy"] = torch.stack([*(v.detach() for v in values), values[0].detach().roll(1), values[1].detach()], 1)
        rows["policy"].requires_grad_()
    total = loss(**rows, **options(loss))
    total.losses.sum().backward()
    assert torch.isfinite(total.losses).all()
    for name, metric in total.metrics.items():
        assert torch.isfinite(metric).all(), name
    for name in learnt:
        gradient = rows[name].grad
        assert gradient is not None and torch.isfinite(gradient.norm())


@pytest.mark.parametrize("loss", [bco, kto, plackett_luce])
def test_reference_gets_no_gradient(loss: Loss) -> None:
    rows = random_rows(loss, 3)
    rows["reference"].requires_grad_()
    rows["policy"].requires_grad_()
    loss(**rows, **options(loss)).losses.sum().backward()
    assert rows["policy"].grad is not None and rows["reference"].grad is None


@pytest.mark.parametrize("loss", [alpha_po, simpo])
def test_importance_weight_is_the_pull_on_the_margin(loss: Loss) -> None:
    rows = {**random_rows(loss, 5, uncertain=True), "weights": None}
    rows["policy_chosen"].requires_grad_()
    total = loss(**rows, **{**options(loss), "alpha": 0.0} if loss is alpha_po else options(loss))
    (pull,) = torch.autograd.grad(total.losses.sum(), rows["policy_chosen"])
    torch.testing.assert_close(-pull * rows["chosen_tokens"] / OPTIONS["beta"], total.metrics["importance_weight"])


@pytest.mark.parametrize("loss", [bco, kto])
def test_importance_weight_is_the_pull_to_the_right_side(loss: Loss) -> None:
    rows = random_rows(loss, 6)
    rows["soft_labels"] = torch.linspace(0, 1, 6, dtype=torch.float64)
    rows["policy"].requires_grad_()
    total = loss(**rows, **options(loss))
    (pull,) = torch.autograd.grad(total.losses.sum(), rows["policy"])
    side = torch.where(rows["desirable"], -1.0, 1.0).double()
    torch.testing.assert_close(side * pull / OPTIONS["beta"], total.metrics["importance_weight"])


def test_orpo_by_hand() -> None:
    # Two tokens at 1/2 each, three at 1/5: odds 1 and 1/4, their ratio 4, and -log sigmoid(log 4) = log(1 + 1/4).
    arguments: dict[str, Any] = {
        "policy_chosen": sums(2 * math.log(0.5)),
        "policy_rejected": sums(3 * math.log(0.2)),
        "chosen_tokens": counts(2),
        "rejected_tokens": counts(3),
        "beta": 0.1,
    }
    total = orpo(**arguments)
    assert total.losses.item() == pytest.approx(math.log(2) + 0.1 * math.log(1.25))
    assert total.metrics["rewards/chosen"].item() == pytest.approx(0.0)
    assert total.metrics["rewards/margins"].item() == pytest.approx(math.log(4))
    # Were the label wrong one time in four: the likelihood stays, log(1 + 4) is the other way round.
    unsure = orpo(**arguments, soft_labels=sums(0.75))
    expected = math.log(2) + 0.1 * (0.75 * math.log(1.25) + 0.25 * math.log(5))
    assert unsure.losses.item() == pytest.approx(expected)


def test_simpo_by_hand() -> None:
    # Means -0.5 and -1.5, times 2: rewards -1 and -3, margin 2, gamma 0.5.
    arguments: dict[str, Any] = {
        "policy_chosen": sums(-2.0),
        "policy_rejected": sums(-3.0),
        "chosen_tokens": counts(4),
        "rejected_tokens": counts(2),
        "beta": 2.0,
        "gamma": 0.5,
    }
    total = simpo(**arguments)
    assert total.losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert total.metrics["rewards/margins"].item() == pytest.approx(2.0)
    assert total.metrics["importance_weight"].item() == pytest.approx(1 / (1 + math.exp(1.5)))
    # A flipped pair wants the margin of -2 to be 0.5: it is short by 2.5.
    flipped = simpo(**arguments, label_smoothing=0.2)
    expected = 0.8 * math.log(1 + math.exp(-1.5)) + 0.2 * math.log(1 + math.exp(2.5))
    assert flipped.losses.item() == pytest.approx(expected)


def test_alpha_po_by_hand() -> None:
    # P = 1/2 and 1/4: with alpha 1 rewards (1 - 2) and (1 - 4), with alpha -1 they are (2 - 1) / 2 ... P - 1.
    arguments: dict[str, Any] = {
        "policy_chosen": sums(3 * math.log(0.5)),
        "policy_rejected": sums(2 * math.log(0.25)),
        "chosen_tokens": counts(3),
        "rejected_tokens": counts(2),
        "beta": 0.5,
        "gamma": 0.25,
    }
    up = alpha_po(**arguments, alpha=1.0)
    assert up.metrics["rewards/chosen"].item() == pytest.approx(-0.5)
    assert up.metrics["rewards/rejected"].item() == pytest.approx(-1.5)
    assert up.losses.item() == pytest.approx(math.log(1 + math.exp(-0.75)))
    down = alpha_po(**arguments, alpha=-1.0)
    assert down.metrics["rewards/chosen"].item() == pytest.approx(-0.25)
    assert down.metrics["rewards/rejected"].item() == pytest.approx(-0.375)


def test_alpha_po_at_zero_is_simpo_and_near_zero_is_near_it() -> None:
    rows = random_rows(simpo, 7)
    plain = simpo(**rows, **options(simpo)).losses
    assert torch.equal(alpha_po(**rows, **options(simpo), alpha=0.0).losses, plain)
    torch.testing.assert_close(alpha_po(**rows, **options(simpo), alpha=1e-7).losses, plain, atol=1e-6, rtol=0)


def test_cpo_by_hand() -> None:
    # 0.1 * (-10 - -20) = 1; the likelihood per token is -10 / 5 = -2, half of it counts.
    total = cpo(
        policy_chosen=sums(-10.0), policy_rejected=sums(-20.0), chosen_tokens=counts(5), beta=0.1, nll_weight=0.5
    )
    assert total.losses.item() == pytest.approx(math.log(1 + math.exp(-1)) + 1.0)
    assert total.metrics["rewards/chosen"].item() == pytest.approx(-1.0)


def test_kto_by_hand() -> None:
    # r = -4 - -6 = 2, kl 0.5: beta * (r - kl) = 0.75, on the right side for the first row only.
    total = kto(
        policy=sums(-4.0, -4.0),
        reference=sums(-6.0, -6.0),
        desirable=torch.tensor([True, False]),
        kl=0.5,
        beta=0.5,
        desirable_weight=1.5,
    )
    high = 1 / (1 + math.exp(-0.75))
    assert total.losses.tolist() == pytest.approx([1.5 * (1 - high), high])
    assert total.metrics["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert total.metrics["rewards/mean"].tolist() == [1.0, 1.0]
    assert total.metrics["rewards/margins"].tolist() == [0.75, -0.75]
    assert total.count == 2


@pytest.mark.parametrize("loss", [bco, kto])
def test_a_judge_that_is_sure_of_the_opposite_turns_a_row_over(loss: Loss) -> None:
    rows = random_rows(loss, 4)
    opposite = {**rows, "desirable": ~rows["desirable"]}
    sure = torch.ones(4, dtype=torch.float64)
    turned = loss(**rows, **options(loss), soft_labels=0 * sure)
    torch.testing.assert_close(turned.losses, loss(**opposite, **options(loss), soft_labels=sure).losses)
    torch.testing.assert_close(turned.losses, loss(**opposite, **options(loss)).losses)


def test_kto_kl_is_the_clamped_mean_and_a_constant() -> None:
    policy = sums(-1.0, -5.0, -2.0).requires_grad_()
    # (1 - 2 + 4) / 3 = 1.
    kl = kto_kl(policy=policy, reference=sums(-2.0, -3.0, -6.0))
    assert kl.item() == pytest.approx(1.0) and not kl.requires_grad
    assert kto_kl(policy=policy, reference=sums(0.0, 0.0, 0.0)).item() == 0.0
    with pytest.raises(ValueError, match="got none"):
        kto_kl(policy=sums(), reference=sums())


def test_bco_by_hand() -> None:
    # r = 0.5 * 2 = 1, delta 0.25: 0.75 over the shift.
    total = bco(
        policy=sums(-4.0, -4.0),
        reference=sums(-6.0, -6.0),
        desirable=torch.tensor([True, False]),
        reward_shift=0.25,
        beta=0.5,
        undesirable_weight=2.0,
    )
    assert total.losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.75)), 2 * math.log(1 + math.exp(0.75))])


def test_bco_bounds_dpo_from_above() -> None:
    """Theorem 1 of the paper: -log s(r_w) - log s(-r_l) > -log s(r_w - r_l), whatever the shift."""
    chosen, rejected = 3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zero = torch.zeros_like(chosen)
    pairs = dpo(
        policy_chosen=chosen, policy_rejected=rejected, reference_chosen=zero, reference_rejected=zero, beta=1.0
    )
    rows = bco(
        policy=torch.cat([chosen, rejected]),
        reference=torch.cat([zero, zero]),
        desirable=torch.arange(100) < 50,
        reward_shift=0.7,
        beta=1.0,
    )
    assert (rows.losses.view(2, 50).sum(0) > pairs.losses).all()


def test_likelihoods_by_hand() -> None:
    arguments: dict[str, Any] = {
        "logprob_sum": sums(-6.0, -1.0, 0.0),
        "token_counts": counts(3, 2, 0),
        "weights": sums(1.0, 2.0, 1.0),
    }
    tokens = negative_log_likelihood(**arguments)
    assert tokens.losses.tolist() == [6.0, 2.0, 0.0]
    # Stays a tensor: reading it would make the device wait.
    assert isinstance(tokens.count, Tensor) and tokens.count.item() == 5
    rows = sequence_mean_nll(**arguments)
    assert rows.losses.tolist() == [2.0, 1.0, 0.0] and rows.count == 3


def test_unlikelihood_by_hand() -> None:
    total = unlikelihood(policy_chosen=sums(-3.0), policy_rejected=sums(-8.0), alpha=0.25)
    assert total.losses.item() == pytest.approx(3.0 - 0.25 * 8.0)


def test_weighted_sum_by_hand() -> None:
    rows = random_rows(dpo, 3)
    chosen = dpo(**rows, beta=0.1)
    likelihood = sequence_mean_nll(logprob_sum=rows["policy_chosen"], token_counts=counts(4, 2, 5))
    total = weighted_sum({"dpo": (0.8, chosen), "likelihood": (0.5, likelihood)})
    torch.testing.assert_close(total.losses, 0.8 * chosen.losses + 0.5 * likelihood.losses)
    assert total.count == 3
    torch.testing.assert_close(total.metrics["loss/dpo"], chosen.losses)
    torch.testing.assert_close(total.metrics["loss/likelihood"], likelihood.losses)
    torch.testing.assert_close(total.metrics["rewards/margins"], chosen.metrics["rewards/margins"])


def test_terms_that_count_differently_are_not_summed() -> None:
    rows = random_rows(dpo, 3)
    chosen = dpo(**rows, beta=0.1)
    per_token = negative_log_likelihood(logprob_sum=rows["policy_chosen"], token_counts=counts(4, 2, 5))
    with pytest.raises(ValueError, match="dpo, likelihood"):
        weighted_sum({"dpo": (1.0, chosen), "likelihood": (1.0, per_token)})
    with pytest.raises(ValueError, match="got no terms"):
        weighted_sum({})
