"""Supervised fine-tuning: imitate demonstrations, or the chosen completions of pairs."""

from collections.abc import Iterable, Iterator

from prefopt.config import SFTConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.errors import DataError
from prefopt.losses import LossTotal, negative_log_likelihood
from prefopt.model.adapter import check_targets
from prefopt.model.logprobs import sequence_logprob_sum
from prefopt.model.policy import make_policy
from prefopt.outcome import Sampler, finish
from prefopt.progress import say
from prefopt.records import Comparison, Demonstration, Ranking, Rating, Record
from prefopt.run import RunFolder
from prefopt.setup import begin_health, begin_run, check_path, device_and_dtype, load, manifest, read_groups, split_rows
from prefopt.train.budget import training_budget
from prefopt.train.loop import Objective, fit, total_steps
from prefopt.train.step import evaluate_loss, one_step

__all__ = ["train"]


def train(config: SFTConfig, resumed: RunFolder | None = None) -> RunFolder:
    """Read demonstrations, train on their completions, save the model and report.

    The loss is the mean over completion tokens of -log p, so a step weighs tokens, not rows.

    Args:
        resumed: The run folder to go on with; `config` is then the one saved in it.
    """
    device, dtype = device_and_dtype(config.dtype)
    if resumed is None:
        RunFolder.refuse_taken(config.out)
    loaded, renderer = load(config, dtype, device)
    check_targets(loaded.model, config.lora_targets)
    groups, audit = read_groups(config, loaded.model, renderer, _demonstrations)
    rows = split_rows(config, groups, audit)
    run = begin_run(config, "sft", rows, manifest(config, loaded), resumed)

    path = check_path(loaded.model, rows.train, device)
    if resumed is None:
        run.event("path", step=0, path=path.path, reason=path.reason, max_difference=path.max_difference)
    sampler = Sampler.over(config, renderer, rows.held_out or rows.train)
    before = sampler.complete(loaded.model)
    steps = total_steps(config, len(rows.train), config.batch_rows)
    policy = make_policy(loaded.model, config, steps=steps)

    health = begin_health(run, rows, None, resumed=resumed is not None)

    def loss_of(batch: PackedBatch) -> LossTotal:
        sums = sequence_logprob_sum(policy, batch, path.path)
        total = negative_log_likelihood(logprob_sum=sums, token_counts=batch.token_counts, weights=batch.weights)
        total.metrics.update({"logps/completion": sums.detach(), "lengths/completion": batch.token_counts.float()})
        total.metrics["truncated"] = batch.truncated
        return total

    def evaluate() -> dict[str, float]:
        metrics = evaluate_loss(rows.held_out, loss_of, _tokens, tokens_per_batch=budget, device=device)
        return {**metrics, **sampler.length(policy), "rows": len(rows.held_out)}

    budget = training_budget(run, config.tokens_per_batch, policy, loss_of, rows.train, device)
    fit(
        run,
        config,
        Objective(
            label="sft",
            unit="rows",
            update=one_step(loss_of, _tokens, max_grad_norm=config.max_grad_norm, device=device),
            evaluate=evaluate if rows.held_out else None,
            batch=config.batch_rows,
            lr=config.lr,
            tokens_per_batch=budget,
        ),
        policy,
        rows.train,
        health,
        device,
    )
    finish(run, loaded, policy, sampler, before, steps)
    return run


def _tokens(group: CompletionGroup) -> int:
    """The loss is divided by the number of completion tokens."""
    return group.scored_tokens


def _demonstrations(records: Iterable[Record]) -> Iterator[Record]:
    """Demonstrations as they are; of a pair or a ranking the best completion; ratings are refused by name."""
    pairs = 0
    for record in records:
        if isinstance(record, Rating):
            raise DataError(
                "sft imitates completions, and these rows call some of theirs bad.",
                where=str(record.source),
                got="a completion with a label",
                expected="demonstrations or pairs",
                todo="`prefopt dpo --loss kto` takes them; or keep the rows whose label is true, without that column.",
            )
        if isinstance(record, Comparison):
            pairs += 1
            record = Demonstration(record.prompt, record.chosen, record.source, record.weight, record.cut[:1])
        if isinstance(record, Ranking):
            record = Demonstration(record.prompt, record.completions[0], record.source, record.weight)
        yield record
    if pairs:
        say(f"pairs: sft imitates the chosen completion of {pairs:,} pairs")
