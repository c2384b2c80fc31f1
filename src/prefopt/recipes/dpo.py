"""Direct Preference Optimization, from a preference file to an aligned model."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float

from prefopt.config import DPOConfig
from prefopt.data.bins import micro_batches
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, pack
from prefopt.data.store import GroupStore
from prefopt.errors import DataError
from prefopt.losses import LossTotal, dpo
from prefopt.model.adapter import check_targets
from prefopt.model.kl import ReferenceStates, sequence_kl_sum
from prefopt.model.load import LoadedModel, load_reference
from prefopt.model.logprobs import sequence_logprob_sum
from prefopt.model.paths import PathChoice
from prefopt.model.policy import make_policy
from prefopt.model.reference import ReferenceCache, cache_folder, reference_logprobs
from prefopt.outcome import Sampler, finish
from prefopt.records import Comparison, Record
from prefopt.run import RunFolder
from prefopt.setup import begin_health, begin_run, check_path, device_and_dtype, load, manifest, read_groups, split_rows
from prefopt.train.budget import forward_budget, training_budget
from prefopt.train.loop import Objective, fit, total_steps
from prefopt.train.step import evaluate_loss

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
    groups, audit = read_groups(config, loaded.model, renderer, _comparisons)
    rows = split_rows(config, groups, audit)
    reference = load_reference(config.reference, loaded, dtype, device) if config.reference else loaded
    run = begin_run(config, "dpo", rows, {**manifest(config, loaded), "reference": reference.fingerprint}, resumed)

    path = check_path(loaded.model, rows.train, device)
    if resumed is None:
        run.event("path", step=0, path=path.path, reason=path.reason, max_difference=path.max_difference)
    reference_path = check_path(reference.model, rows.train, device) if config.reference else path
    logps = _score_reference(config, reference, groups, reference_path, dtype, device)
    kl_batches, kl_states = _kl_states(config, reference, rows.held_out, reference_path, device)
    del reference  # not in memory while training
    sampler = Sampler.over(config, renderer, rows.held_out or rows.train)
    before = sampler.complete(loaded.model)

    steps = total_steps(config, len(rows.train), config.batch_pairs)
    policy = make_policy(loaded.model, config, steps=steps)

    health = begin_health(run, rows, config.beta, resumed=resumed is not None)

    def loss_of(batch: PackedBatch) -> LossTotal:
        sums = sequence_logprob_sum(policy, batch, path.path)
        known = logps[batch.places]
        total = dpo(
            policy_chosen=sums[0::2],
            policy_rejected=sums[1::2],
            reference_chosen=known[:, 0],
            reference_rejected=known[:, 1],
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            weights=batch.weights,
        )
        counts = batch.token_counts.float()
        total.metrics.update({"lengths/chosen": counts[0::2], "lengths/rejected": counts[1::2]})
        total.metrics["truncated"] = batch.truncated
        return total

    def evaluate() -> dict[str, float]:
        metrics = evaluate_loss(rows.held_out, loss_of, _one, tokens_per_batch=budget, device=device)
        if kl_states is not None:
            kl = sequence_kl_sum(policy, kl_states, kl_batches, path.path)
            metrics["kl"] = float(kl.double().mean())
        return {**metrics, **sampler.length(policy), "pairs": len(rows.held_out)}

    budget = training_budget(run, config.tokens_per_batch, policy, loss_of, rows.train, device)
    fit(
        run,
        config,
        Objective(
            label="dpo",
            unit="pairs",
            loss_of=loss_of,
            count_of=_one,
            evaluate=evaluate if rows.held_out else None,
            batch=config.batch_pairs,
            lr=config.lr,
            max_grad_norm=config.max_grad_norm,
            tokens_per_batch=budget,
        ),
        policy,
        rows.train,
        health,
        device,
    )
    finish(run, loaded, policy, sampler, before, steps)
    return run


def _comparisons(records: Iterable[Record]) -> Iterator[Record]:
    """Pairs only; anything else is named, with the recipe that takes it."""
    for record in records:
        if not isinstance(record, Comparison):
            raise DataError(
                "dpo trains on pairs.",
                where=str(record.source),
                got=f"a {type(record).__name__.lower()} (one completion)",
                expected="a prompt with a chosen and a rejected completion",
                todo="Demonstrations go to `prefopt sft`; single rated completions need a rejected partner first.",
            )
        yield record


def _one(_: CompletionGroup) -> int:
    """The loss is divided by the number of pairs."""
    return 1


def _score_reference(
    config: DPOConfig,
    reference: LoadedModel,
    groups: GroupStore,
    path: PathChoice,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[torch.Tensor, "rows 2"]:
    """Of every pair by its place in `groups`, chosen first."""

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
