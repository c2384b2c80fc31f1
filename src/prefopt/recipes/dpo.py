"""Preference optimization, DPO and its family, from a preference file to an aligned model."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from prefopt.config import DPOConfig
from prefopt.data.bins import micro_batches
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, pack
from prefopt.data.store import GroupStore
from prefopt.errors import DataError
from prefopt.losses import LossTotal, wpo_weights
from prefopt.model.adapter import check_targets
from prefopt.model.head import head_of, target_logprobs
from prefopt.model.kl import ReferenceStates, sequence_kl_sum
from prefopt.model.load import LoadedModel, load_reference, row_positions
from prefopt.model.logprobs import plain_model, sequence_logprob_sum, target_hidden
from prefopt.model.paths import PathChoice
from prefopt.model.policy import make_policy
from prefopt.model.reference import ReferenceCache, cache_folder, reference_logprobs
from prefopt.model.statistics import target_statistics
from prefopt.moving import MovingReference
from prefopt.objectives import OBJECTIVES, Rows
from prefopt.outcome import Sampler, finish
from prefopt.preference import (
    combined,
    heads_of,
    inputs_of,
    needs_reference,
    pair_tensors,
    ranking_tensors,
    rating_tensors,
    wpo_tensors,
)
from prefopt.progress import say
from prefopt.records import Comparison, Demonstration, Ranking, Rating, Record
from prefopt.run import RunFolder
from prefopt.setup import (
    begin_health,
    begin_run,
    check_path,
    device_and_dtype,
    length_limit,
    load,
    manifest,
    read_groups,
    split_rows,
)
from prefopt.thresholds import Thresholds, mismatched
from prefopt.train.budget import forward_budget, training_budget
from prefopt.train.loop import Objective, fit, total_steps
from prefopt.train.step import evaluate_loss, one_step

__all__ = ["train"]

_KL_TOKENS = 4096  # of a batch whose hidden states are kept, where no budget is asked for


def train(config: DPOConfig, resumed: RunFolder | None = None) -> RunFolder:
    """Read pairs, score them under the reference, train the policy, save it and report.

    Args:
        resumed: The run folder to go on with; `config` is then the one saved in it.
    """
    device, dtype = device_and_dtype(config.dtype)
    if resumed is None:
        RunFolder.refuse_taken(config.out)
    loaded, renderer = load(config, dtype, device)
    check_targets(loaded.model, config.lora_targets)
    selection = _Selection(config)
    groups, audit = read_groups(config, loaded.model, renderer, selection)
    if "chosen_wins" in inputs_of(config.terms) and not selection.soft:
        raise DataError(
            "The loss sppo_soft is over a judge's probabilities, and no row has one.",
            where=", ".join(config.data),
            expected="a column probability: that the chosen completion is the better one",
            todo="Use --loss sppo_hard, which takes the chosen one for certain.",
        )
    rows = split_rows(config, groups, audit)
    reference = load_reference(config.reference, loaded, dtype, device) if config.reference else loaded
    run = begin_run(config, "dpo", rows, {**manifest(config, loaded), "reference": reference.fingerprint}, resumed)

    path = check_path(loaded.model, rows.train, device)
    if resumed is None:
        run.event("path", step=0, path=path.path, reason=path.reason, max_difference=path.max_difference)
    reference_path = check_path(reference.model, rows.train, device) if config.reference else path
    inputs = inputs_of(config.terms)
    score = partial(_score_reference, config, reference, reference_path, dtype, device)
    logps = None
    if needs_reference(config.terms) and config.move_reference_every is None:
        logps = score(groups)
    stored_heads = GroupStore.write(heads_of(group) for group in groups) if "reference_chosen_head" in inputs else None
    heads = None if stored_heads is None else score(stored_heads)
    twins = {}
    if "kl" in inputs:
        limit = length_limit(config.max_length, row_positions(loaded.model.config))
        for name, part in (("train", rows.train), ("eval", rows.held_out)):
            if part:
                made = mismatched(part, limit)
                twins[name] = part, made, score(made)
    kl_batches, kl_states = _kl_states(config, reference, rows.held_out, reference_path, device)
    starting = copy.deepcopy(reference.model) if config.move_reference_every is not None else None
    del reference, score  # not in memory while training
    sampler = Sampler.over(config, renderer, rows.held_out or rows.train)
    before = sampler.complete(loaded.model)

    steps = total_steps(config, len(rows.train), config.batch_pairs)
    policy = make_policy(loaded.model, config, steps=steps)

    moving = None
    if starting is not None and config.move_reference_every is not None:
        say("the reference moves: its log-probabilities are computed in every step, their cache is not used")
        every, share = config.move_reference_every, config.move_reference_share
        moving = MovingReference(starting, policy, reference_path.path, every=every, share=share)
    if any(term.name.startswith("aot") for term in config.terms):
        say("aot compares sorted rewards within a micro-batch: here --tokens-per-batch is part of the result")
    health = begin_health(run, rows, _dpo_beta(config), resumed=resumed is not None)
    loss, unit = combined(config.terms), "pairs" if config.over == "pairs" else "rows"
    thresholds = Thresholds(
        inputs, config.terms, twins, lambda batch: sequence_logprob_sum(policy, batch, path.path), policy
    )

    def loss_of(batch: PackedBatch) -> LossTotal:
        head, hidden = head_of(plain_model(policy)), target_hidden(policy, batch, path.path)
        logprobs = target_logprobs(head, hidden, batch.targets)
        known, known_heads = (None if table is None else table[batch.places] for table in (logps, heads))
        if moving is not None:
            known = moving.score(batch)
        if config.over == "pairs":
            tensors = pair_tensors(batch, logprobs, known, known_heads)
        elif config.over == "ratings":
            tensors = rating_tensors(batch, logprobs, known)
        else:
            tensors = ranking_tensors(batch, logprobs, known)
        if selection.soft and config.over == "pairs":
            tensors["soft_labels"] = batch.labels
        if not selection.soft:
            tensors.pop("soft_labels", None)
        if config.pair_weights == "wpo":
            collision = target_statistics(head, hidden.detach(), batch.targets, collision=True).collision
            tensors["weights"] = batch.weights * wpo_weights(**wpo_tensors(batch, tensors, collision))
        total = loss(tensors | thresholds.tensors())
        total.metrics.update(thresholds.metrics(tensors) | _lengths(batch, config.over))
        total.metrics["truncated"] = batch.truncated
        return total

    def prepare(part: Sequence[CompletionGroup]) -> None:
        thresholds.prepare("train", part, budget)
        if moving is not None:
            moving.prepare()

    def learn(metrics: Mapping[str, Any]) -> None:
        thresholds.learn(metrics)
        if moving is not None:
            moving.learn()

    def evaluate() -> dict[str, float]:
        thresholds.prepare("eval", rows.held_out, budget)
        metrics = evaluate_loss(rows.held_out, loss_of, _one, tokens_per_batch=budget, device=device)
        if kl_states is not None:
            kl = sequence_kl_sum(policy, kl_states, kl_batches, path.path)
            metrics["kl"] = float(kl.double().mean())
        return {**metrics, **sampler.length(policy), unit: len(rows.held_out)}

    budget = training_budget(run, config.tokens_per_batch, policy, loss_of, rows.train, device)
    fit(
        run,
        config,
        Objective(
            label="dpo",
            unit=unit,
            update=one_step(loss_of, _one, max_grad_norm=config.max_grad_norm, device=device),
            evaluate=evaluate if rows.held_out else None,
            batch=config.batch_pairs,
            lr=config.lr,
            tokens_per_batch=budget,
            prepare=prepare,
            learn=learn,
            kept={} if moving is None else moving.tensors,
        ),
        policy,
        rows.train,
        health,
        device,
    )
    finish(run, loaded, policy, sampler, before, steps)
    return run


class _Selection:
    """The rows that the loss is over; anything else is named, with the losses that take it.

    Attributes:
        soft: Whether any row so far came with a judge's probability.
    """

    def __init__(self, config: DPOConfig) -> None:
        self._terms, self._over = config.terms, config.over
        self.soft = False
        self._margin = False  # seen in a row

    def __call__(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            if isinstance(record, Comparison | Rating) and record.probability != 1:
                self._need(record, ("soft_labels", "chosen_wins"), f"probability {record.probability:g}")
                self.soft = True
            if isinstance(record, Comparison) and record.margin and not self._margin:
                self._margin = True
                say("margin: a column of `prefopt reward`; it is left aside here")
            if isinstance(record, Comparison) and self._over == "rankings":
                record = Ranking(
                    record.prompt, (record.chosen, record.rejected), record.source, record.weight, record.cut
                )
            if not isinstance(record, _RECORDS[self._over]):
                raise self._other(record)
            if record.weight != 1:
                self._need(record, ("weights",), f"weight {record.weight:g}")
            yield record

    def _other(self, record: Record) -> DataError:
        names = " + ".join(term.name for term in self._terms)
        kinds: dict[type, Rows] = {Comparison: "pairs", Rating: "ratings", Ranking: "rankings"}
        if isinstance(record, Demonstration):
            todo = "Demonstrations go to `prefopt sft`."
        else:
            mine = kinds[type(record)]
            takers = [name for name, kind in OBJECTIVES.items() if kind.rows == mine]
            todo = f"For {mine} there is --loss {' or '.join(takers) if len(takers) < 4 else 'dpo, its default'}."
        return DataError(
            f"The loss {names} is over {self._over}.",
            where=str(record.source),
            got=f"a {type(record).__name__.lower()}",
            expected=_EXPECTED[self._over],
            todo=todo,
        )

    def _need(self, record: Record, tensors: tuple[str, ...], got: str) -> None:
        """That every term has a place for what the row brings along."""
        for term in self._terms:
            if inputs_of([term]).isdisjoint(tensors):
                column = got.split()[0]
                raise DataError(
                    f"The loss {term.name} has no place for a row's {column}.",
                    where=str(record.source),
                    got=got,
                    expected="1, or a loss whose equation has one, such as dpo",
                    todo=f"Take another loss, or leave the column {column} out.",
                )


_RECORDS: dict[Rows, type] = {"pairs": Comparison, "ratings": Rating, "rankings": Ranking}
_EXPECTED: dict[Rows, str] = {
    "pairs": "a prompt with a chosen and a rejected completion",
    "ratings": "a prompt with a completion and its label, true or false",
    "rankings": "a prompt with two or more completions, the best first",
}


def _lengths(batch: PackedBatch, over: Rows) -> dict[str, torch.Tensor]:
    """Scored tokens, per group."""
    counts = batch.token_counts.float()
    if over == "pairs":
        return {"lengths/chosen": counts[0::2], "lengths/rejected": counts[1::2]}
    if over == "ratings":
        return {"lengths/completion": counts}
    own = counts.split([len(group.completions) for group in batch.groups])
    return {"lengths/completion": torch.stack([each.mean() for each in own])}


def _dpo_beta(config: DPOConfig) -> float | None:
    """DPO's beta where the loss is DPO's alone: its start at ln 2 and the scale of its rewards are known."""
    (first, *others) = config.terms
    return None if others or first.name != "dpo" else float(first.parameters["beta"])


def _one(_: CompletionGroup) -> int:
    """The loss is divided by the number of pairs."""
    return 1


def _score_reference(
    config: DPOConfig,
    reference: LoadedModel,
    path: PathChoice,
    dtype: torch.dtype,
    device: torch.device,
    groups: GroupStore,
) -> Float[torch.Tensor, "rows completions"]:
    """Of every group by its place in `groups`, completions in their order."""

    def score(batch: PackedBatch) -> torch.Tensor:
        return sequence_logprob_sum(reference.model, batch, path.path)

    reference.model.eval()
    cache = ReferenceCache(cache_folder(), f"{reference.fingerprint} {dtype}")
    return reference_logprobs(
        groups,
        cache,
        score,
        tokens_per_batch=lambda: forward_budget(config.tokens_per_batch, score, groups, device),
        device=device,
    )


def _kl_states(
    config: DPOConfig, reference: LoadedModel, held_out: GroupStore, path: PathChoice, device: torch.device
) -> tuple[list[PackedBatch], ReferenceStates | None]:
    """Batches of the first held-out pairs and what the reference makes of them; nothing where KL is off."""
    parts = micro_batches(held_out[: config.kl_rows], config.tokens_per_batch or _KL_TOKENS)
    batches = [pack(part).to(device) for part in parts]
    return batches, ReferenceStates.of(reference.model, batches, path.path) if batches else None
