"""Reward models: a score for every completion, learnt from which of a prompt's completions is the better."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from prefopt.config import RewardConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.data.store import GroupStore
from prefopt.data.tokenize import Renderer
from prefopt.errors import DataError, RewardError
from prefopt.evaluate.preferences import Agreement, agreement
from prefopt.losses import LossTotal, reward_ranking
from prefopt.model.adapter import check_targets
from prefopt.model.load import eos_ids
from prefopt.model.logprobs import plain_model
from prefopt.model.policy import make_policy
from prefopt.model.reward import choose_score_path, sequence_scores, to_reward_model
from prefopt.outcome import save_and_report
from prefopt.preference import by_group
from prefopt.progress import say
from prefopt.records import Comparison, Ranking, Record
from prefopt.run import RunFolder, write_atomically
from prefopt.setup import begin_health, begin_run, check_path, device_and_dtype, load, manifest, read_groups, split_rows
from prefopt.train.budget import training_budget
from prefopt.train.loop import Objective, fit, total_steps
from prefopt.train.step import evaluate_loss, one_step

__all__ = ["train"]

_NO_SPREAD = 1e-8  # of the mean: what rounding makes of scores that are all alike


def train(config: RewardConfig, resumed: RunFolder | None = None) -> RunFolder:
    """Read pairs and rankings, train a scoring head and the model under it, normalise, save and report.

    Args:
        resumed: The run folder to go on with; `config` is then the one saved in it.
    """
    device, dtype = device_and_dtype(config.dtype)
    if resumed is None:
        RunFolder.refuse_taken(config.out)
    loaded, renderer = load(config, dtype, device)
    made_of = manifest(config, loaded)
    model = to_reward_model(loaded, renderer, template=config.template, seed=config.seed)
    check_targets(model.base_model, config.lora_targets)
    # Anew: the tokenizer may have got a padding token.
    stops = eos_ids(config.model, loaded.tokenizer)
    renderer = Renderer(loaded.tokenizer, template=config.template, eos_ids=stops)
    groups, audit = read_groups(config, model, renderer, _compared)
    rows = split_rows(config, groups, audit)
    run = begin_run(config, "reward", rows, made_of, resumed)

    path = check_path(model, rows.train, device, choose_score_path)
    if resumed is None:
        run.event("path", step=0, path=path.path, reason=path.reason, max_difference=path.max_difference)
    steps = total_steps(config, len(rows.train), config.batch_pairs)
    policy = make_policy(model, config, steps=steps)
    health = begin_health(run, rows, None, resumed=resumed is not None)
    unit = "pairs" if groups.completions.max() == 2 else "rows"
    measured: list[Agreement] = []

    def score(batch: PackedBatch) -> Tensor:
        return sequence_scores(policy, batch, path.path)

    def loss_of(batch: PackedBatch) -> LossTotal:
        return _loss(config, batch, score(batch))

    def measure(part: GroupStore) -> _Measured:
        kept: list[tuple[Sequence[CompletionGroup], Tensor]] = []

        def noted(batch: PackedBatch) -> LossTotal:
            scores = score(batch)
            kept.append((batch.groups, scores))
            return _loss(config, batch, scores)

        metrics = evaluate_loss(part, noted, _one, tokens_per_batch=budget, device=device)
        return _Measured(metrics, _table(kept, groups)[part.places])

    def evaluate() -> dict[str, float]:
        now = measure(rows.held_out)
        measured.append(agreement(rows.held_out, now.scores))
        return {**now.metrics, **measured[-1].metrics(), unit: len(rows.held_out)}

    budget = training_budget(run, config.tokens_per_batch, policy, loss_of, rows.train, device)
    fit(
        run,
        config,
        Objective(
            label="reward",
            unit=unit,
            update=one_step(loss_of, _one, max_grad_norm=config.max_grad_norm, device=device),
            evaluate=evaluate if rows.held_out else None,
            batch=config.batch_pairs,
            lr=config.lr,
            tokens_per_batch=budget,
        ),
        policy,
        rows.train,
        health,
        device,
    )
    if config.normalize != "none":
        policy.eval()
        say("normalize: scoring the training rows")
        _normalize(run, config, plain_model(policy), measure(rows.train).scores, steps)
    if measured:
        outcome = json.dumps(_outcome(run, measured[-1], config), indent=2, ensure_ascii=False)
        write_atomically(run.path / "outcome.json", outcome.encode())
    save_and_report(run, policy, loaded.tokenizer, steps)
    return run


@dataclass(frozen=True)
class _Measured:
    """Mean metrics of some rows, and every score; NaN where a row has fewer completions than others."""

    metrics: dict[str, float]
    scores: Float64[np.ndarray, "rows most"]


def _loss(config: RewardConfig, batch: PackedBatch, scores: Float[Tensor, " sequences"]) -> LossTotal:
    rewards = by_group(batch, scores)
    total = reward_ranking(
        rewards=rewards.values,
        present=rewards.present,
        soft_labels=batch.labels,
        target_margins=batch.margins,
        centering=config.centering,
        weights=batch.weights,
    )
    lengths = by_group(batch, batch.token_counts.float()).values
    worst = rewards.present.sum(1, keepdim=True) - 1
    total.metrics.update({"lengths/chosen": lengths[:, 0], "lengths/rejected": lengths.gather(1, worst)[:, 0]})
    total.metrics["truncated"] = batch.truncated
    return total


def _table(
    kept: Iterable[tuple[Sequence[CompletionGroup], Float[Tensor, " _"]]], groups: GroupStore
) -> Float64[np.ndarray, "stored most"]:
    """Scores of each group by its place; NaN where there is none."""
    found = np.full((len(groups), int(groups.completions.max())), np.nan)
    for part, scores in kept:
        values = scores.double().cpu().numpy()
        for group in part:
            k = len(group.completions)
            found[group.place, :k], values = values[:k], values[k:]
    return found


def _one(_: CompletionGroup) -> int:
    """The loss is divided by the number of prompts compared."""
    return 1


def _compared(records: Iterable[Record]) -> Iterator[Record]:
    """Pairs and rankings; what compares nothing is refused by name."""
    for record in records:
        if not isinstance(record, Comparison | Ranking):
            raise DataError(
                "A reward model learns from comparisons.",
                where=str(record.source),
                got=f"a {type(record).__name__.lower()}",
                expected="pairs (chosen, rejected) or rankings (completions, the best first, or with scores)",
                todo="Demonstrations go to `prefopt sft`, rated completions to `prefopt dpo --loss kto`.",
            )
        yield replace(record, cut=())  # a score is of a completion with its end: the same in training


def _normalize(
    run: RunFolder,
    config: RewardConfig,
    model: torch.nn.Module,
    scores: Float64[np.ndarray, "rows most"],
    step: int,
) -> None:
    """Set `reward_bias`, and for `scale` the head's gain: InstructGPT's shift, or Ziegler et al. 2019's gain and bias.

    Raises:
        RewardError: all scores are the same, and no gain makes their deviation 1.
    """
    known, gain = scores[np.isfinite(scores)], 1.0
    middle = float(scores[:, 0].mean())
    if config.normalize == "scale":
        middle, deviation = float(known.mean()), float(known.std())
        if deviation <= _NO_SPREAD * max(1.0, abs(middle)):
            raise RewardError(
                "The reward model gives every completion the same score.",
                where=f"{len(known):,} completions of the training rows",
                got=f"{middle:g}",
                expected="scores that differ, since --normalize scale divides by their deviation",
                todo="Raise --lr or train longer, or use --normalize shift.",
            )
        gain = 1 / deviation
        head = model.get_submodule("score")
        assert isinstance(head, torch.nn.Linear)
        with torch.no_grad():
            head.weight.mul_(gain)
    bias = -gain * middle
    model.config.reward_bias = bias  # type: ignore[union-attr]
    run.event("normalized", step=step, how=config.normalize, gain=gain, bias=bias)
    say(f"normalize: reward = logit {bias:+.4f}" + (f", the head times {gain:.4f}" if gain != 1 else ""))


_TOLD = {
    "accuracy": "Accuracy",
    "calibration_error": "Calibration error",
    "length/correlation": "Correlation with length",
    "length/longer_preferred": "Longer completion scores higher, share",
    "length/longer_chosen": "Longer completion is the better one, share",
}


def _outcome(run: RunFolder, found: Agreement, config: RewardConfig) -> dict[str, Any]:
    """What the report says on top: in words, before and after, and whether probabilities are what they say."""
    evaluations: list[Mapping[str, Any]] = [line for line in run.metrics() if line["split"] == "eval"]
    low, high = found.interval.low, found.interval.high
    verdict = "" if low > 0.5 else "; chance is within it" if high >= 0.5 else "; that is worse than chance"
    text = (
        f"On {found.pairs:,} held-out pairs of {found.prompts:,} prompts the better completion scores higher in "
        f"{found.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}, over prompts{verdict}). "
        f"The longer one scores higher in {found.longer_preferred:.1%} and is the better one in "
        f"{found.longer_chosen:.1%} of those of unequal length. Predicted probabilities miss the observed shares by "
        f"{found.calibration_error:.1%} on average"
    )
    text += ", before --normalize scale took the scale away." if config.normalize == "scale" else "."
    return {
        "title": "How well it knows the better one",
        "text": text,
        "rows": [(label, evaluations[0][name], evaluations[-1][name]) for name, label in _TOLD.items()],
        "calibration": found.calibration(),
    }
