"""What every objective over pairs must hold: gradients, extremes, micro-batches, order, labels, weights."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from prefopt import losses
from prefopt.losses import LossTotal, dpo

Loss = Callable[..., LossTotal]


@dataclass(frozen=True)
class Case:
    """An objective and its parameters; `soft` gives it soft labels too."""

    loss: Loss
    options: dict[str, Any] = field(default_factory=dict)
    soft: bool = False

    def __str__(self) -> str:
        settings = [str(v) for k, v in self.options.items() if k != "beta"] + ["soft"] * self.soft
        return "-".join([self.loss.__name__, *settings])


CASES = [
    Case(losses.dpo, {"beta": 0.7}),
    Case(losses.dpo, {"beta": 0.7, "label_smoothing": 0.2}),
    Case(losses.dpo, {"beta": 0.7, "label_smoothing": 0.2}, soft=True),
    Case(losses.robust_dpo, {"beta": 0.7, "label_smoothing": 0.2}),
    Case(losses.ipo, {"beta": 0.4}),
    Case(losses.ipo, {"beta": 0.4}, soft=True),
    Case(losses.ipo_sum, {"beta": 0.4}),
    Case(losses.ipo_sum, {"beta": 0.4}, soft=True),
    Case(losses.hinge, {"beta": 0.7}),
    Case(losses.exo, {"beta": 0.7}),
    Case(losses.exo, {"beta": 0.7, "label_smoothing": 0.1}, soft=True),
    Case(losses.discopop, {"beta": 0.3, "tau": 0.2}),
    Case(losses.discopop, {"beta": 0.3, "tau": 1.0}),
    Case(losses.nca, {"beta": 0.7}),
    Case(losses.nca, {"beta": 0.7}, soft=True),
    Case(losses.bco_pair, {"beta": 0.7, "reward_shift": 0.3}),
    Case(losses.sppo_hard, {"beta": 0.4}),
    Case(losses.sppo_soft, {"beta": 0.4}),
    Case(losses.apo_zero, {"beta": 0.7}),
    Case(losses.apo_down, {"beta": 0.7}),
    Case(losses.aot, {"beta": 0.7, "label_smoothing": 0.2}),
    Case(losses.aot_unpaired, {"beta": 0.7, "label_smoothing": 0.2}),
    Case(losses.length_normalized_dpo, {"beta": 5.0, "label_smoothing": 0.2}, soft=True),
    Case(losses.r_dpo, {"beta": 0.7, "alpha": 0.3, "label_smoothing": 0.2}, soft=True),
    Case(losses.ld_dpo, {"beta": 0.7, "alpha": 0.3, "label_smoothing": 0.2}, soft=True),
    *(
        Case(losses.f_dpo, {"beta": 0.7, "divergence": which, "label_smoothing": 0.2}, soft=True)
        for which in ("reverse_kl", "forward_kl", "jensen_shannon")
    ),
    Case(losses.f_dpo, {"beta": 0.7, "divergence": "alpha", "alpha": 0.4}),
]
every = pytest.mark.parametrize("case", CASES, ids=str)
SORTING = (losses.aot, losses.aot_unpaired)
ANCHORED = (losses.nca, losses.bco_pair, losses.sppo_hard, losses.sppo_soft, losses.apo_zero, losses.apo_down)


def arguments(case: Case, rows: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Random tensors for whatever the objective asks; the policy's want gradients."""
    generator = torch.Generator().manual_seed(1)

    def uniform() -> Tensor:
        return torch.rand(rows, generator=generator, dtype=dtype)

    known: dict[str, Any] = {}
    for name in inspect.signature(case.loss).parameters:
        if name.startswith("policy_"):
            known[name] = (4 * uniform() - 6).requires_grad_()
        elif name.startswith("reference_"):
            known[name] = 4 * uniform() - 6
        elif name.endswith("_tokens"):
            known[name] = torch.randint(1, 9, (rows,), generator=generator)
        elif name.endswith("_wins") or (name == "soft_labels" and case.soft):
            known[name] = uniform()
    return {**known, **case.options}


def policy_of(known: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in known.items() if name.startswith("policy_")}


def rows_of(known: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in known.items()}


def test_every_objective_over_pairs_is_among_the_cases() -> None:
    over_pairs = {
        value
        for name in losses.__all__
        if inspect.isfunction(value := getattr(losses, name))
        and {"reference_chosen", "reference_chosen_head"} & set(inspect.signature(value).parameters)
    }
    assert over_pairs == {case.loss for case in CASES}


@every
def test_docstrings_have_the_parts_that_their_page_is_made_of(case: Case) -> None:
    doc = inspect.getdoc(case.loss) or ""
    first, rest = doc.split("\n\n", 1)
    about, rest = rest.split("\nArgs:\n")
    parameters, elsewhere = rest.split("\nElsewhere:\n")
    assert first.endswith(".") and "\n" not in first
    assert "arXiv" in about and any(line.startswith("    loss ") for line in about.splitlines())
    assert all(name in parameters for name in inspect.signature(case.loss).parameters)
    assert "TRL: " in elsewhere


@every
def test_gradients_against_finite_differences(case: Case) -> None:
    known = arguments(case)
    names = list(policy_of(known))

    def loss(*policy: Tensor) -> Tensor:
        return case.loss(**known | dict(zip(names, policy, strict=True))).losses

    assert torch.autograd.gradcheck(loss, [known[name] for name in names])


@every
def test_the_reference_gets_no_gradient_and_metrics_carry_none(case: Case) -> None:
    known = arguments(case)
    references = [value.requires_grad_() for name, value in known.items() if name.startswith("reference_")]
    total = case.loss(**known)
    total.losses.sum().backward()
    assert all(reference.grad is None for reference in references)
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in policy_of(known).values())
    assert not any(metric.requires_grad for metric in total.metrics.values())


@every
def test_losses_and_gradients_are_finite_at_ten_thousand_nats(case: Case) -> None:
    signs = list(product((-1e4, 1e4), repeat=2))
    known = arguments(case, rows=len(signs), dtype=torch.float32) | {"beta": 1.0}
    for name, value in policy_of(known).items():
        side = 0 if "chosen" in name else 1
        with torch.no_grad():
            value.copy_(torch.tensor([pair[side] for pair in signs]))
    total = case.loss(**known)
    total.losses.sum().backward()
    assert total.losses.isfinite().all()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in policy_of(known).values())
    assert all(metric.isfinite().all() for metric in total.metrics.values())


@pytest.mark.parametrize("case", [c for c in CASES if c.loss not in SORTING], ids=str)
def test_micro_batches_and_the_order_of_rows_change_no_loss(case: Case) -> None:
    known = arguments(case)
    whole = case.loss(**known)
    parts = [case.loss(**rows_of(known, rows)) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat([part.losses for part in parts]), whole.losses)
    assert sum(int(part.count) for part in parts) == whole.count == 5

    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(case.loss(**rows_of(known, order)).losses, whole.losses[order])


@pytest.mark.parametrize("case", [c for c in CASES if c.loss in SORTING], ids=str)
def test_sorting_losses_ignore_the_order_of_rows_but_not_how_the_batch_is_cut(case: Case) -> None:
    known = arguments(case)
    whole = case.loss(**known).losses
    torch.testing.assert_close(case.loss(**rows_of(known, torch.tensor([3, 0, 4, 2, 1]))).losses, whole)
    parts = [case.loss(**rows_of(known, rows)).losses for rows in (slice(0, 2), slice(2, 5))]
    assert (torch.cat(parts).sum() - whole.sum()).abs() > 1e-3
    assert not {"weights", "soft_labels"} & set(inspect.signature(case.loss).parameters)


@pytest.mark.parametrize("case", [c for c in CASES if c.loss not in SORTING], ids=str)
def test_weights_multiply_losses_and_leave_the_count(case: Case) -> None:
    known = arguments(case)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    plain, weighted = case.loss(**known), case.loss(**known, weights=weights)
    torch.testing.assert_close(weighted.losses, plain.losses * weights)
    assert weighted.count == plain.count
    for name, metric in plain.metrics.items():
        torch.testing.assert_close(weighted.metrics[name], metric)


@pytest.mark.parametrize("case", [c for c in CASES if c.soft], ids=str)
def test_a_certain_soft_label_is_a_plain_label(case: Case) -> None:
    known = arguments(case)
    plain = case.loss(**{**known, "soft_labels": None})
    certain = case.loss(**{**known, "soft_labels": torch.ones(5, dtype=torch.float64)})
    torch.testing.assert_close(certain.losses, plain.losses)
    assert (case.loss(**known).losses - plain.losses).abs().min() > 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if c.soft and c.loss is not losses.nca], ids=str)
def test_a_label_that_is_surely_wrong_swaps_the_pair(case: Case) -> None:
    known = arguments(case)
    swapped = {
        name.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected"): value
        for name, value in known.items()
    }
    wrong = case.loss(**{**known, "soft_labels": torch.zeros(5, dtype=torch.float64)})
    right = case.loss(**{**swapped, "soft_labels": torch.ones(5, dtype=torch.float64)})
    torch.testing.assert_close(wrong.losses, right.losses)


@every
def test_the_importance_weight_is_how_fast_the_loss_falls_with_the_margin(case: Case) -> None:
    known = arguments(case)
    if "importance_weight" not in (now := case.loss(**known).metrics):
        assert case.loss in (*SORTING, *ANCHORED)  # no function of the margin alone
        return
    name, step = next(iter(policy_of(known))), 1e-6
    up, down = (case.loss(**{**known, name: known[name].detach() + h}) for h in (step, -step))
    slope = (up.losses - down.losses) / (up.metrics["rewards/margins"] - down.metrics["rewards/margins"])
    torch.testing.assert_close(now["importance_weight"], -slope, atol=1e-6, rtol=1e-6)


def test_shapes_that_would_broadcast_are_refused() -> None:
    for case in CASES:
        known = arguments(case)
        first = next(iter(policy_of(known)))
        with pytest.raises(TypeCheckError):
            case.loss(**{**known, first: known[first][:1]})


@pytest.mark.parametrize(
    ("loss", "options", "complaint"),
    [
        (losses.dpo, {"label_smoothing": 0.5}, "label_smoothing"),
        (losses.robust_dpo, {"label_smoothing": -0.1}, "label_smoothing"),
        (losses.exo, {"label_smoothing": 0.0}, "label_smoothing > 0"),
        (losses.discopop, {"tau": 0.0}, "tau"),
        (losses.discopop, {"tau": 1.5}, "tau"),
        (losses.ld_dpo, {"alpha": 1.5}, "alpha"),
        (losses.f_dpo, {"divergence": "alpha"}, "alpha goes with"),
        (losses.f_dpo, {"divergence": "forward_kl", "alpha": 0.5}, "alpha goes with"),
        (losses.f_dpo, {"divergence": "alpha", "alpha": 1.0}, "alpha is between"),
    ],
)
def test_parameters_without_meaning_are_refused(loss: Loss, options: dict[str, Any], complaint: str) -> None:
    case = Case(loss, {"beta": 0.1, **options})
    with pytest.raises(ValueError, match=complaint):
        loss(**arguments(case))


# --- where one objective is another ---


def same(left: LossTotal, right: LossTotal) -> None:
    torch.testing.assert_close(left.losses, right.losses)
    for name in left.metrics.keys() & right.metrics.keys():
        torch.testing.assert_close(left.metrics[name], right.metrics[name])


def test_objectives_that_meet_in_dpo() -> None:
    known = arguments(Case(dpo, {"beta": 0.7}))
    tokens: dict[str, Any] = {f"{side}_tokens": torch.tensor([1, 2, 3, 4, 5]) for side in ("chosen", "rejected")}
    ones: dict[str, Any] = {name: torch.ones_like(count) for name, count in tokens.items()}
    plain = dpo(**known)
    same(losses.robust_dpo(**known, label_smoothing=0.0), plain)
    same(losses.r_dpo(**known, **tokens, alpha=0.0), plain)
    same(losses.length_normalized_dpo(**known, **ones), plain)
    same(losses.f_dpo(**known, divergence="reverse_kl"), plain)
    heads: dict[str, Any] = {f"{name}_head": 0.25 * value for name, value in known.items() if name != "beta"}
    tails: dict[str, Any] = {f"{name}_tail": 0.75 * value for name, value in known.items() if name != "beta"}
    same(losses.ld_dpo(**heads, **tails, beta=0.7, alpha=1.0), plain)
    # Without tails, alpha has nothing to act on.
    none: dict[str, Any] = {name: torch.zeros_like(value) for name, value in tails.items()}
    whole: dict[str, Any] = {f"{name}_head": value for name, value in known.items() if name != "beta"}
    same(losses.ld_dpo(**whole, **none, beta=0.7, alpha=0.0), plain)


def test_ipo_of_one_token_is_ipo_of_sums() -> None:
    known = arguments(Case(losses.ipo_sum, {"beta": 0.4}))
    one = torch.ones(5, dtype=torch.int64)
    same(losses.ipo(**known, chosen_tokens=one, rejected_tokens=one), losses.ipo_sum(**known))


def test_sppo_with_certain_winners_is_the_hard_one() -> None:
    known = arguments(Case(losses.sppo_hard, {"beta": 0.4}))
    ones, zeros = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    same(losses.sppo_soft(**known, chosen_wins=ones, rejected_wins=zeros), losses.sppo_hard(**known))


def test_alpha_divergences_lie_between_the_two_kl() -> None:
    known = arguments(Case(dpo, {"beta": 0.7}))

    def total(alpha: float) -> Tensor:
        return losses.f_dpo(**known, divergence="alpha", alpha=alpha).losses

    torch.testing.assert_close(total(1e-7), dpo(**known).losses, atol=1e-5, rtol=1e-5)
    forward = losses.f_dpo(**known, divergence="forward_kl").losses
    torch.testing.assert_close(total(1 - 1e-7), forward, atol=1e-5, rtol=1e-5)


def test_robust_dpo_on_flipped_labels_is_dpo_on_clean_ones_in_expectation() -> None:
    eps = 0.2
    margins = torch.linspace(-3, 3, 13, dtype=torch.float64)
    zero = torch.zeros_like(margins)

    def robust(policy: Tensor) -> Tensor:
        return losses.robust_dpo(
            policy_chosen=policy, policy_rejected=zero, reference_chosen=zero, reference_rejected=zero, beta=1.0,
            label_smoothing=eps,
        ).losses  # fmt: skip

    clean = dpo(
        policy_chosen=margins, policy_rejected=zero, reference_chosen=zero, reference_rejected=zero, beta=1.0
    ).losses
    torch.testing.assert_close((1 - eps) * robust(margins) + eps * robust(-margins), clean)
    assert robust(torch.full_like(margins, 20.0)).max() < -5  # not bounded below: -20 * 0.2 / 0.6 = -6.7


def test_discopop_has_the_local_minimum_its_docstring_speaks_of() -> None:
    at = torch.tensor([-2.6, -2.371, -2.2], dtype=torch.float64)
    zero = torch.zeros_like(at)
    total = losses.discopop(
        policy_chosen=at, policy_rejected=zero, reference_chosen=zero, reference_rejected=zero, beta=0.05
    )
    assert total.losses.argmin() == 1
    assert abs(total.metrics["importance_weight"][1]) < 1e-2 < abs(total.metrics["importance_weight"][0])


def test_weights_of_wpo_by_hand() -> None:
    # Two tokens of (0.8, 0.2) and one of (0.5, 0.5): sum of squares 0.68, 0.68 and 0.5.
    policy = torch.tensor([math.log(0.8) + math.log(0.2)], dtype=torch.float64).requires_grad_()
    weights = losses.wpo_weights(
        policy_chosen=policy,
        policy_rejected=torch.tensor([math.log(0.5)], dtype=torch.float64),
        chosen_log_collision=torch.tensor([2 * math.log(0.68)], dtype=torch.float64),
        rejected_log_collision=torch.tensor([math.log(0.5)], dtype=torch.float64),
        chosen_tokens=torch.tensor([2]),
        rejected_tokens=torch.tensor([1]),
    )
    # Chosen: sqrt(0.8 * 0.2) / 0.68 = 0.4 / 0.68; rejected: 0.5 / 0.5.
    assert weights.item() == pytest.approx(0.4 / 0.68)
    assert not weights.requires_grad


def test_weighted_sums_add_losses_and_name_their_parts() -> None:
    known = arguments(Case(dpo, {"beta": 0.7}))
    terms = {"dpo": (0.8, dpo(**known)), "apo_zero": (0.2, losses.apo_zero(**known))}
    total = losses.weighted_sum(terms)
    torch.testing.assert_close(total.losses, 0.8 * terms["dpo"][1].losses + 0.2 * terms["apo_zero"][1].losses)
    torch.testing.assert_close(total.metrics["loss/apo_zero"], terms["apo_zero"][1].losses.detach())
    torch.testing.assert_close(total.metrics["rewards/chosen"], terms["dpo"][1].metrics["rewards/chosen"])
    assert total.count == 5
    likelihood = losses.negative_log_likelihood(
        logprob_sum=known["policy_chosen"], token_counts=torch.tensor([3, 1, 4, 1, 5])
    )
    with pytest.raises(ValueError, match="count the same"):
        losses.weighted_sum({**terms, "sft": (1.0, likelihood)})
    with pytest.raises(ValueError, match="no terms"):
        losses.weighted_sum({})
