"""Every objective that TRL has too, against TRL's own trainer; where they differ, both numbers are here.

A real DPOTrainer is built for each setting. It is handed the per-token log-probabilities by a stand-in
for its fused model, so that masks, sums, scores, losses, weights and the mean are all TRL's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt import losses
from prefopt.losses import LossTotal
from tiny import save_tiny_model

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16 sets the old name in its own configuration.
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
)

PROMPT = 3  # tokens before every completion
LENGTHS = (4, 7, 2, 5, 6), (6, 3, 2, 8, 1)  # of the chosen and the rejected completions


@dataclass(frozen=True)
class Scores:
    """Log-probabilities per token, [chosen then rejected, tokens], zero outside the completion."""

    policy: Tensor
    reference: Tensor
    collision: Tensor  # log of the sum of squared probabilities
    lengths: Tensor

    @classmethod
    def random(cls, dtype: torch.dtype = torch.float64) -> "Scores":
        lengths = torch.tensor(LENGTHS).flatten()
        generator = torch.Generator().manual_seed(0)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]

        def draw(scale: float) -> Tensor:
            return torch.rand(mask.shape, generator=generator, dtype=dtype) * -scale * mask

        reference = draw(3.0)
        return cls(reference - 0.5 * draw(1.0) + draw(1.0), reference, draw(4.0), lengths)

    @classmethod
    def of_log_ratios(cls, chosen: float, rejected: float, dtype: torch.dtype = torch.float32) -> "Scores":
        """One pair of completions of one token each."""
        policy = torch.tensor([[chosen], [rejected]], dtype=dtype)
        return cls(policy, torch.zeros_like(policy), torch.zeros_like(policy), torch.tensor([1, 1]))

    def sums(self) -> dict[str, Any]:
        """What our objectives take; the policy's are leaves."""
        found = {}
        for who, tokens in (("policy", self.policy), ("reference", self.reference)):
            for side, values in zip(("chosen", "rejected"), tokens.sum(1).chunk(2), strict=True):
                found[f"{who}_{side}"] = values.clone().requires_grad_(who == "policy")
        return found

    def tokens(self) -> dict[str, Tensor]:
        chosen, rejected = self.lengths.chunk(2)
        return {"chosen_tokens": chosen, "rejected_tokens": rejected}

    def halves(self) -> dict[str, Any]:
        """Heads of the shorter length, and tails."""
        head = torch.arange(self.policy.shape[1]) < torch.minimum(*self.lengths.chunk(2)).repeat(2)[:, None]
        found = {}
        for who, tokens in (("policy", self.policy), ("reference", self.reference)):
            for part, kept in (("head", tokens * head), ("tail", tokens * ~head)):
                for side, values in zip(("chosen", "rejected"), kept.sum(1).chunk(2), strict=True):
                    found[f"{who}_{side}_{part}"] = values
        return found


class Trl:
    """Builds trainers and runs their loss on given scores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        save_tiny_model(self.model)

    def trainer(self, **settings: Any) -> Any:
        # Here, and not above: the import takes seconds, which every worker that only collects would pay.
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        config = DPOConfig(
            output_dir=str(self.folder / "out"), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **settings
        )
        models = [AutoModelForCausalLM.from_pretrained(self.model) for _ in range(2)]
        return DPOTrainer(
            *models,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}]),
            processing_class=AutoTokenizer.from_pretrained(self.model),
        )

    def loss(self, scores: Scores, **settings: Any) -> tuple[float, Tensor]:
        """TRL's loss, and its gradient by each completion's log-probability, chosen then rejected."""
        trainer = self.trainer(**settings)
        policy = padded(scores.policy).requires_grad_()
        trainer.ref_model = stand_in(padded(scores.reference), scores)
        result = trainer.compute_loss(stand_in(policy, scores), batch(scores))
        result.backward()
        assert policy.grad is not None
        return result.item(), policy.grad[:, PROMPT - 1]  # of its first token, and so of each


def padded(tokens: Tensor) -> Tensor:
    """With places for the prompt's tokens after the first, which nobody predicts."""
    return torch.cat([tokens.new_zeros(len(tokens), PROMPT - 1), tokens], dim=1).detach()


def batch(scores: Scores) -> dict[str, Tensor]:
    places = torch.arange(PROMPT + scores.policy.shape[1])
    here = places < PROMPT + scores.lengths[:, None]
    return {
        "input_ids": torch.zeros_like(here, dtype=torch.int64),
        "attention_mask": here.long(),
        "completion_mask": (here & (places >= PROMPT)).long(),
    }


def stand_in(log_probs: Tensor, scores: Scores) -> Callable[..., SimpleNamespace]:
    """A model with TRL's fused head, as far as its trainer looks."""
    zeros = torch.zeros_like(log_probs)
    output = SimpleNamespace(
        log_probs=log_probs,
        log_sum_sq_probs=padded(scores.collision),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    return lambda **_: output


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Trl:
    return Trl(tmp_path_factory.mktemp("trl"))


def agree(trl: Trl, total: Callable[[dict[str, Any]], LossTotal], scores: Scores, **settings: Any) -> None:
    """The means, and their gradients by the policy's log-probabilities."""
    sums = scores.sums()
    ours = total(sums).losses.mean()
    ours.backward()
    theirs, gradient = trl.loss(scores, **settings)
    assert ours.item() == pytest.approx(theirs, abs=1e-6, rel=1e-6)
    gradients = [sums[f"policy_{side}"].grad for side in ("chosen", "rejected")]
    torch.testing.assert_close(torch.cat([g for g in gradients if g is not None]), gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(
    ("name", "loss", "settings", "options"),
    [
        ("sigmoid", losses.dpo, {}, {}),
        ("robust", losses.robust_dpo, {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("hinge", losses.hinge, {}, {}),
        ("exo_pair", losses.exo, {"label_smoothing": 1e-3}, {}),
        ("nca_pair", losses.nca, {}, {}),
        ("bco_pair", losses.bco_pair, {}, {"reward_shift": 0.0}),
        ("sppo_hard", losses.sppo_hard, {}, {}),
        ("aot", losses.aot, {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("aot_unpaired", losses.aot_unpaired, {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("discopop", losses.discopop, {}, {}),
    ],
)
def test_agrees(
    trl: Trl, name: str, loss: Callable[..., LossTotal], settings: dict[str, Any], options: dict[str, Any], beta: float
) -> None:
    agree(
        trl,
        lambda sums: loss(**sums, beta=beta, **options),
        Scores.random(),
        loss_type=[name],
        beta=beta,
        **settings,
    )


@pytest.mark.parametrize(("name", "loss"), [("ipo", losses.ipo), ("sigmoid_norm", losses.length_normalized_dpo)])
def test_agrees_per_token(trl: Trl, name: str, loss: Callable[..., LossTotal]) -> None:
    scores = Scores.random()
    agree(trl, lambda sums: loss(**sums, **scores.tokens(), beta=0.3), scores, loss_type=[name], beta=0.3)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("forward_kl", "forward_kl"), ("js_divergence", "jensen_shannon"), ("alpha_divergence", "alpha")],
)
def test_agrees_on_divergences(trl: Trl, theirs: str, ours: losses.Divergence) -> None:
    alpha = 0.5 if ours == "alpha" else None  # TRL's default
    agree(
        trl,
        lambda sums: losses.f_dpo(**sums, beta=0.3, divergence=ours, alpha=alpha),
        Scores.random(torch.float32),  # its alpha divergence knows no float64
        loss_type=["sigmoid"],
        beta=0.3,
        f_divergence_type=theirs,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_agrees_on_length_desensitised_dpo(trl: Trl, alpha: float) -> None:
    scores = Scores.random()
    ours = losses.ld_dpo(**scores.halves(), beta=0.3, alpha=alpha)
    theirs, _ = trl.loss(scores, loss_type=["sigmoid"], beta=0.3, ld_alpha=alpha)
    assert ours.losses.mean().item() == pytest.approx(theirs, abs=1e-6)


def test_agrees_on_the_weights_of_wpo(trl: Trl) -> None:
    scores = Scores.random()
    collision = dict(zip(("chosen", "rejected"), scores.collision.sum(1).chunk(2), strict=True))

    def total(sums: dict[str, Any]) -> LossTotal:
        weights = losses.wpo_weights(
            policy_chosen=sums["policy_chosen"],
            policy_rejected=sums["policy_rejected"],
            chosen_log_collision=collision["chosen"],
            rejected_log_collision=collision["rejected"],
            **scores.tokens(),
        )
        assert weights.max() > 1 > weights.min()  # TRL no longer cuts at 1
        return losses.dpo(**sums, beta=0.3, weights=weights)

    agree(trl, total, scores, loss_type=["sigmoid"], beta=0.3, use_weighting=True)


def test_agrees_on_sums_of_objectives(trl: Trl) -> None:
    agree(
        trl,
        lambda sums: losses.weighted_sum(
            {
                "dpo": (0.8, losses.dpo(**sums, beta=0.3)),
                "bco": (0.2, losses.bco_pair(**sums, beta=0.3, reward_shift=0.0)),
            }
        ),
        Scores.random(),
        loss_type=["sigmoid", "bco_pair"],
        loss_weights=[0.8, 0.2],
        beta=0.3,
    )


# --- where they differ: one pair, its log-ratios (chosen, rejected) in the test, both numbers by hand ---


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


def differ(total: LossTotal, ours: float, result: tuple[float, Tensor], theirs: float) -> None:
    assert total.losses.item() == pytest.approx(ours, rel=1e-5)
    assert result[0] == pytest.approx(theirs, rel=1e-5, nan_ok=True)


def test_trl_ignores_label_smoothing_beside_sigmoid(trl: Trl) -> None:
    scores = Scores.of_log_ratios(1.0, -1.0)
    differ(
        losses.dpo(**scores.sums(), beta=1.0, label_smoothing=0.3),
        0.7 * nls(2.0) + 0.3 * nls(-2.0),  # 0.727
        trl.loss(scores, loss_type=["sigmoid"], beta=1.0, label_smoothing=0.3),
        nls(2.0),  # 0.127
    )


def test_trl_adds_one_to_apo(trl: Trl) -> None:
    scores = Scores.of_log_ratios(1.0, -1.0)
    sums = scores.sums()
    zero, down = losses.apo_zero(**sums, beta=1.0), losses.apo_down(**sums, beta=1.0)
    theirs = trl.loss(scores, loss_type=["apo_zero"], beta=1.0)
    differ(zero, sigmoid(-1.0) - sigmoid(1.0), theirs, 1 + sigmoid(-1.0) - sigmoid(1.0))  # -0.462 and 0.538
    found = torch.autograd.grad(zero.losses.sum(), [sums["policy_chosen"], sums["policy_rejected"]])
    torch.testing.assert_close(torch.cat(found), theirs[1])
    theirs = trl.loss(scores, loss_type=["apo_down"], beta=1.0)
    differ(down, sigmoid(1.0) - sigmoid(2.0), theirs, 1 + sigmoid(1.0) - sigmoid(2.0))  # -0.150 and 0.850
    found = torch.autograd.grad(down.losses.sum(), [sums["policy_chosen"], sums["policy_rejected"]])
    torch.testing.assert_close(torch.cat(found), theirs[1])


def test_trl_has_no_reward_shift_in_bco(trl: Trl) -> None:
    scores = Scores.of_log_ratios(3.0, 1.0)
    differ(
        losses.bco_pair(**scores.sums(), beta=1.0, reward_shift=2.0),
        nls(1.0) + nls(1.0),  # 0.627: rewards less their mean
        trl.loss(scores, loss_type=["bco_pair"], beta=1.0),
        nls(3.0) + nls(-1.0),  # 1.362
    )


def test_trl_ipo_is_not_the_equation_as_printed(trl: Trl) -> None:
    policy = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    scores = Scores(policy, torch.zeros_like(policy), torch.zeros_like(policy), torch.tensor([2, 2]))
    differ(
        losses.ipo_sum(**scores.sums(), beta=0.25),
        4.0,  # h = 2 - -2 = 4, target 2
        trl.loss(scores, loss_type=["ipo"], beta=0.25),
        0.0,  # h = 1 - -1 = 2
    )


def test_trl_coefficient_of_the_alpha_divergence_is_one_minus_the_papers(trl: Trl) -> None:
    scores = Scores.of_log_ratios(1.0, -1.0)
    differ(
        losses.f_dpo(**scores.sums(), beta=1.0, divergence="alpha", alpha=0.2),
        nls((math.exp(0.2) - math.exp(-0.2)) / 0.2),  # 0.125
        trl.loss(
            scores, loss_type=["sigmoid"], beta=1.0, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.2
        ),
        nls((math.exp(0.8) - math.exp(-0.8)) / 0.8),  # 0.103: alpha = 0.8
    )


def test_trl_forward_kl_is_nan_where_both_completions_became_unlikely(trl: Trl) -> None:
    scores = Scores.of_log_ratios(-101.0, -100.0)
    differ(
        losses.f_dpo(**scores.sums(), beta=0.1, divergence="forward_kl"),
        0.1 * math.exp(40),  # one nat along the tangent at -40
        trl.loss(scores, loss_type=["sigmoid"], beta=0.1, f_divergence_type="forward_kl"),
        math.nan,
    )


def test_trl_alpha_divergence_has_no_gradient_where_it_is_cut(trl: Trl) -> None:
    scores = Scores.of_log_ratios(-200.0, 0.0)  # alpha 0.5: u^-alpha = e^100
    _, gradient = trl.loss(scores, loss_type=["sigmoid"], beta=0.1, f_divergence_type="alpha_divergence")
    sums = scores.sums()
    losses.f_dpo(**sums, beta=0.1, divergence="alpha", alpha=0.5).losses.sum().backward()
    assert sums["policy_chosen"].grad is not None
    assert gradient[0] == 0.0
    assert sums["policy_chosen"].grad.item() == pytest.approx(-0.1 * math.exp(40), rel=1e-5)


def test_trl_discopop_is_nan_for_pairs_far_apart_the_wrong_way(trl: Trl) -> None:
    scores = Scores.of_log_ratios(-100.0, 0.0)
    theirs = trl.loss(scores, loss_type=["discopop"], beta=1.0)
    differ(losses.discopop(**scores.sums(), beta=1.0), 100.0, theirs, math.nan)


def test_trl_goes_on_where_robust_dpo_turns_its_sign(trl: Trl) -> None:
    scores = Scores.of_log_ratios(1.0, 0.0)
    _, gradient = trl.loss(scores, loss_type=["robust"], beta=1.0, label_smoothing=0.6)
    assert gradient[0] > 0 > gradient[1]  # the chosen completion goes down
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.robust_dpo(**scores.sums(), beta=1.0, label_smoothing=0.6)


def test_trl_counts_a_tie_as_a_miss(trl: Trl) -> None:
    scores = Scores.of_log_ratios(0.5, 0.5)
    trainer = trl.trainer()
    trainer.ref_model = stand_in(padded(scores.reference), scores)
    trainer.compute_loss(stand_in(padded(scores.policy), scores), batch(scores))
    assert trainer._metrics["eval"]["rewards/accuracies"] == [0.0]  # transformers loads models for evaluation
    assert losses.dpo(**scores.sums(), beta=0.1).metrics["rewards/accuracies"].item() == 0.5
