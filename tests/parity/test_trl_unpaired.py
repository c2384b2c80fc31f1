"""KTO, ORPO, CPO, SimPO and AlphaPO against TRL's own methods; where they differ, both numbers are here.

The methods run unbound, on a stand-in for the trainer that holds what they read of it.
"""

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.losses import alpha_po, cpo, kto, kto_kl, orpo, simpo

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """TRL's trainers. Here, and not above: the import takes seconds, which all who only collect would pay."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        from trl import KTOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer

    return SimpleNamespace(KTO=KTOTrainer, CPO=CPOTrainer, ORPO=ORPOTrainer)


def pairs() -> dict[str, Any]:
    """What the objectives without a reference take."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 12, (2, 40), generator=g)
    sums = -3 * torch.rand(2, 40, generator=g, dtype=torch.float64) * tokens
    return {
        "policy_chosen": sums[0].requires_grad_(),
        "policy_rejected": sums[1].detach().clone().requires_grad_(),
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
    }


def means(rows: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return rows["policy_chosen"] / rows["chosen_tokens"], rows["policy_rejected"] / rows["rejected_tokens"]


def agree(rows: dict[str, Any], ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    """Values, and gradients by both sums."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=tolerance, rtol=tolerance)
    learnt = [rows["policy_chosen"], rows["policy_rejected"]]
    gradients = [torch.autograd.grad(loss.sum(), learnt, retain_graph=True) for loss in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


def cpo_loss(trl: SimpleNamespace, chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
    """TRL's loss per pair, without the likelihood term, which it adds to the mean."""
    defaults = {"loss_type": "sigmoid", "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.5}
    losses: Tensor = trl.CPO.cpo_loss(
        SimpleNamespace(accelerator=ACCELERATOR, **{**defaults, **settings}), chosen, rejected
    )[0]
    return losses


def kto_step(trl: SimpleNamespace, rows: dict[str, Tensor], beta: float, **settings: Any) -> float:
    """TRL's mean loss of rows of one token, whose mismatched completions are `kl_policy` and `kl_reference`."""
    count = len(rows["policy"])
    here = torch.ones(count, 2, dtype=torch.int64)
    places = torch.tensor([0, 1]).expand(count, 2)

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        which = "kl_policy" if input_ids[0, 0] == 1 else "policy"
        zero = torch.zeros(count, 1)
        return SimpleNamespace(log_probs=rows[which][:, None], entropy=zero, mean_logits=zero)

    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        model=SimpleNamespace(training=True),
        calculate_KL=True,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        loss_type="kto",
        beta=beta,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{"desirable_weight": 1.0, "undesirable_weight": 1.0, **settings},
    )
    trainer._compute_kl_logps = lambda *arguments: trl.KTO._compute_kl_logps(trainer, *arguments)
    batch = {
        "input_ids": torch.zeros(count, 2, dtype=torch.int64),
        "attention_mask": here,
        "completion_mask": places,
        "KL_input_ids": torch.ones(count, 2, dtype=torch.int64),
        "KL_attention_mask": here,
        "KL_completion_mask": places,
        "label": rows["desirable"],
        "ref_logps": rows["reference"],
        "ref_KL_logps": rows["kl_reference"],
    }
    return float(trl.KTO._compute_loss(trainer, model, batch, False))


def labelled_rows(moved: float) -> dict[str, Tensor]:
    """Rows of KTO; `moved` is about how far the policy lies from the reference on mismatched completions."""
    g = torch.Generator().manual_seed(4)
    draws = -20 * torch.rand(4, 30, generator=g, dtype=torch.float64)
    return {
        "policy": draws[0],
        "reference": draws[1],
        "kl_policy": draws[2] + moved,
        "kl_reference": draws[3],
        "desirable": torch.rand(30, generator=g) < 0.4,
    }


@pytest.mark.parametrize("moved", [3.0, -3.0])
def test_kto_agrees(trl: SimpleNamespace, moved: float) -> None:
    rows = labelled_rows(moved)
    kl = kto_kl(policy=rows["kl_policy"], reference=rows["kl_reference"])
    assert (kl > 0) == (moved > 0)
    weights: dict[str, Any] = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    total = kto(
        policy=rows["policy"], reference=rows["reference"], desirable=rows["desirable"], kl=kl, beta=0.2, **weights
    )
    assert total.losses.mean().item() == pytest.approx(kto_step(trl, rows, 0.2, **weights), abs=1e-6)


def test_kto_under_accumulation_is_another_loss_in_trl(trl: SimpleNamespace) -> None:
    """Each of TRL's micro-batches has a reference point of its own; ours is the step's."""
    rows = labelled_rows(3.0)
    halves = [{name: value[part] for name, value in rows.items()} for part in (slice(0, 15), slice(15, 30))]
    theirs = sum(kto_step(trl, half, 0.2) for half in halves) / 2
    kl = kto_kl(policy=rows["kl_policy"], reference=rows["kl_reference"])
    parts = [
        kto(policy=half["policy"], reference=half["reference"], desirable=half["desirable"], kl=kl, beta=0.2)
        for half in halves
    ]
    ours = sum(part.losses.sum().item() for part in parts) / sum(int(part.count) for part in parts)
    assert ours == pytest.approx(kto_step(trl, rows, 0.2), abs=1e-6)
    assert (round(ours, 4), round(theirs, 4)) == (0.4393, 0.4451)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_orpo_odds_ratio_agrees(trl: SimpleNamespace, beta: float) -> None:
    """TRL subtracts beta * log sigmoid(log odds ratio) from the likelihood, in float32."""
    rows = pairs()
    theirs = -trl.ORPO.odds_ratio_loss(SimpleNamespace(accelerator=ACCELERATOR, beta=beta), *means(rows))[0]
    ours = orpo(**rows, beta=beta).losses + means(rows)[0]
    agree(rows, ours, theirs, tolerance=2e-6)


def trl_likelihood(trainer: Any) -> float:
    """TRL's likelihood term: chosen rows of 2 and 8 tokens at -1 and -3 nats each, after prompts of 10 at -2."""
    prompt, lengths, nats = 10, (2, 8), (-1.0, -3.0)
    places = torch.arange(prompt + max(lengths))
    here = places < prompt + torch.tensor(lengths)[:, None]
    labels = torch.where(here & (places >= prompt), 0, -100)
    logprob = torch.where(places < prompt, -2.0, torch.tensor(nats)[:, None]).exp()
    # Two words in the vocabulary, and every token is the first of them; logits stand a place before their token.
    logits = torch.stack([logprob, 1 - logprob], -1).log().roll(-1, 1)
    side = {"input_ids": torch.zeros_like(labels), "attention_mask": here.long(), "labels": labels}
    batch = {f"{which}_{name}": value for which in ("chosen", "rejected") for name, value in side.items()}
    stand_in = SimpleNamespace(
        accelerator=ACCELERATOR,
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        aux_loss_enabled=False,
        cpo_alpha=1.0,
        loss_type="sigmoid",
        concatenated_inputs=trainer.concatenated_inputs,
        get_batch_logps=trainer.get_batch_logps,
    )
    return float(
        trainer.concatenated_forward(stand_in, lambda *_, **__: SimpleNamespace(logits=logits.repeat(2, 1, 1)), batch)[
            4
        ]
    )


def test_the_likelihood_terms_are_means_over_tokens_in_trl_and_orpos_takes_in_the_prompt(trl: SimpleNamespace) -> None:
    sums, tokens = torch.tensor([-2.0, -24.0]), torch.tensor([2, 8])
    ours = cpo(policy_chosen=sums, policy_rejected=sums, chosen_tokens=tokens, beta=0.0).losses - math.log(2)
    likelihood = orpo(policy_chosen=sums, policy_rejected=sums, chosen_tokens=tokens, rejected_tokens=tokens, beta=0.0)
    assert ours.mean().item() == pytest.approx((1 + 3) / 2, abs=1e-6)
    assert likelihood.losses.mean().item() == pytest.approx((1 + 3) / 2)
    assert trl_likelihood(trl.CPO) == pytest.approx((2 * 1 + 8 * 3) / 10)  # 2.6
    # Nobody predicts the first token of a prompt, so 9 of its 10 count.
    assert trl_likelihood(trl.ORPO) == pytest.approx((2 * 9 * 2 + 2 * 1 + 8 * 3) / 28)  # 2.21


def test_orpo_of_certain_completions_is_nan_in_trl(trl: SimpleNamespace) -> None:
    rows: dict[str, Any] = {
        "policy_chosen": torch.tensor([0.0], requires_grad=True),
        "policy_rejected": torch.tensor([-1.0], requires_grad=True),
        "chosen_tokens": torch.tensor([3]),
        "rejected_tokens": torch.tensor([3]),
    }
    theirs = -trl.ORPO.odds_ratio_loss(SimpleNamespace(accelerator=ACCELERATOR, beta=0.1), *means(rows))[0]
    ours = orpo(**rows, beta=0.1).losses
    gradients = [torch.autograd.grad(loss.sum(), rows["policy_chosen"])[0].item() for loss in (ours, theirs)]
    assert math.isfinite(gradients[0]) and math.isnan(gradients[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo_agrees(trl: SimpleNamespace, smoothing: float) -> None:
    rows = pairs()
    preference = cpo_loss(trl, rows["policy_chosen"], rows["policy_rejected"], beta=0.3, label_smoothing=smoothing)
    taken = {name: value for name, value in rows.items() if name != "rejected_tokens"}
    agree(rows, cpo(**taken, beta=0.3, nll_weight=0.0, label_smoothing=smoothing).losses, preference)
    # The second term, where one pair is the batch; of several TRL takes the mean over all their tokens.
    both = cpo(**taken, beta=0.3, nll_weight=0.5, label_smoothing=smoothing).losses
    agree(rows, both, preference - 0.5 * means(rows)[0])


@pytest.mark.parametrize("beta", [0.1, 2.5])
def test_simpo_agrees(trl: SimpleNamespace, beta: float) -> None:
    rows = pairs()
    theirs = cpo_loss(trl, *means(rows), loss_type="simpo", beta=beta, simpo_gamma=0.8)
    agree(rows, simpo(**rows, beta=beta, gamma=0.8).losses, theirs)


def test_simpo_flipped_pairs_are_let_off_the_margin_in_trl(trl: SimpleNamespace) -> None:
    """Equal completions, gamma 1: a flipped pair is short by gamma as an unflipped one is, says the equation."""
    one = torch.tensor([-1.0], dtype=torch.float64)
    tokens = torch.tensor([1])
    theirs = cpo_loss(trl, one, one, loss_type="simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.4).item()
    ours = simpo(
        policy_chosen=one,
        policy_rejected=one,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
        beta=2.0,
        gamma=1.0,
        label_smoothing=0.4,
    ).losses.item()
    short, over = math.log(1 + math.e), math.log(1 + 1 / math.e)
    assert ours == pytest.approx(0.6 * short + 0.4 * short)  # 1.313
    assert theirs == pytest.approx(0.6 * short + 0.4 * over)  # 0.913


@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_alpha_po_agrees(trl: SimpleNamespace, alpha: float) -> None:
    rows = pairs()
    theirs = cpo_loss(trl, *means(rows), loss_type="simpo", beta=2.5, simpo_gamma=0.8, alpha=alpha)
    agree(rows, alpha_po(**rows, beta=2.5, gamma=0.8, alpha=alpha).losses, theirs)


def test_alpha_po_of_unlikely_completions_is_nan_in_trl(trl: SimpleNamespace) -> None:
    """At -120 and -110 nats a token P is 0 in float32; rewards are 10 * (1 - e^30) and 10 * (1 - e^27.5)."""
    chosen, rejected = torch.tensor([-110.0]), torch.tensor([-120.0])
    tokens = torch.tensor([1])
    theirs = cpo_loss(trl, chosen, rejected, loss_type="simpo", beta=2.5, simpo_gamma=0.8, alpha=0.25)
    ours = alpha_po(
        policy_chosen=chosen,
        policy_rejected=rejected,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
        beta=2.5,
        gamma=0.8,
        alpha=0.25,
    )
    assert math.isnan(theirs.item())
    assert ours.losses.item() == 0.0
    assert ours.metrics["rewards/rejected"].item() == pytest.approx(10 * (1 - math.exp(30)), rel=1e-6)
