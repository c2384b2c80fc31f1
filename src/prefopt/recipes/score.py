"""Score completions as JSON lines: log-probabilities and implicit rewards, or a reward model's scores."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float64

from prefopt.config import ScoreConfig
from prefopt.data.bins import batches_by_length
from prefopt.data.feed import scored
from prefopt.data.pack import PackedBatch
from prefopt.data.store import GroupStore
from prefopt.model.load import load_reference
from prefopt.model.logprobs import sequence_logprob_sum
from prefopt.model.reward import choose_score_path, load_reward_model, sequence_scores
from prefopt.progress import progress
from prefopt.records import Record
from prefopt.run import write_atomically
from prefopt.setup import check_path, device_and_dtype, introduce, load_named, read_groups
from prefopt.train.budget import forward_budget

__all__ = ["score"]


def score(config: ScoreConfig) -> int:
    """Write a line per usable row to `config.out`, in file order; returns how many.

    A line has `row` and `file`, and per completion `logps/*` and `tokens/*`; with a reference also
    `ref_logps/*` and `rewards/*` = beta * (logps - ref_logps). Completions are called `chosen` and
    `rejected` in pairs, `completion` where there is one, and 1, 2, ... in rankings of three and more.
    Of a reward model it is `scores/*`, transformers' own logit, and `rewards/*`, that plus the model's bias.
    """
    device, dtype = device_and_dtype(config.dtype)
    groups, columns = (_logps if config.reward_model is None else _rewards)(config, dtype, device)
    lines = (json.dumps(line).encode() + b"\n" for line in _lines(groups, columns))
    write_atomically(config.out, lines)
    return len(groups)


# By name, of each group its completions; NaN where a group has fewer than others.
Columns = Mapping[str, Float64[np.ndarray, "rows completions"]]


def _logps(config: ScoreConfig, dtype: torch.dtype, device: torch.device) -> tuple[GroupStore, Columns]:
    """Log-probabilities under the model, and with a reference implicit rewards."""
    assert config.model is not None
    loaded, renderer = load_named(config.model, config.template, dtype, device)
    groups, _ = read_groups(config, loaded.model, renderer, _any)

    def logps(model: torch.nn.Module, label: str) -> Float64[np.ndarray, "rows completions"]:
        path = check_path(model, groups, device).path
        return _of_groups(config, groups, lambda batch: sequence_logprob_sum(model, batch, path), label, device)

    columns = {"logps": logps(loaded.model, "score")}
    if config.reference is not None:
        reference = load_reference(config.reference, loaded, dtype, device)
        columns["ref_logps"] = logps(reference.model, "reference")
        beta = config.beta if config.beta is not None else 1.0
        columns["rewards"] = beta * (columns["logps"] - columns["ref_logps"])
    return groups, columns


def _rewards(config: ScoreConfig, dtype: torch.dtype, device: torch.device) -> tuple[GroupStore, Columns]:
    """A reward model's logits, and its rewards; conversations are written as in training unless asked otherwise."""
    assert config.reward_model is not None
    loaded = load_reward_model(config.reward_model, dtype=dtype, device=device, template=config.template)
    introduce(config.reward_model, loaded.model, loaded.renderer)
    groups, _ = read_groups(config, loaded.model, loaded.renderer, _finished)
    path = check_path(loaded.model, groups, device, choose_score_path).path
    scores = _of_groups(config, groups, lambda batch: sequence_scores(loaded.model, batch, path), "score", device)
    return groups, {"scores": scores, "rewards": scores + loaded.bias}


def _any(records: Iterable[Record]) -> Iterable[Record]:
    return records


def _finished(records: Iterable[Record]) -> Iterator[Record]:
    """A reward is of a completion with its end, also where it broke off: as in training, and everywhere else."""
    return (replace(record, cut=()) for record in records)


@torch.no_grad()
def _of_groups(
    config: ScoreConfig,
    groups: GroupStore,
    score: Callable[[PackedBatch], torch.Tensor],
    label: str,
    device: torch.device,
) -> Float64[np.ndarray, "rows completions"]:
    """What `score` gives each of a group's completions; NaN where a group has fewer than others."""
    budget = forward_budget(config.tokens_per_batch, score, groups, device)
    found = np.full((len(groups), int(groups.completions.max())), np.nan)
    with progress(label, total=len(groups), unit="rows") as bar:
        for batch, results in scored(batches_by_length(groups, budget), score, device):
            sums = results.tolist()
            for group in batch.groups:
                k = len(group.completions)
                found[group.place, :k], sums = sums[:k], sums[k:]
            bar.advance(len(batch.groups))
    return found


def _lines(groups: GroupStore, columns: Columns) -> Iterator[dict[str, object]]:
    for number, group in enumerate(groups):
        k = len(group.completions)
        names = {1: ["completion"], 2: ["chosen", "rejected"]}.get(k, [str(place + 1) for place in range(k)])
        line: dict[str, object] = {"row": group.source.row, "file": group.source.file}
        for k, name in enumerate(names):
            line[f"tokens/{name}"] = group.completions[k].scored_tokens
            for column, values in columns.items():
                line[f"{column}/{name}"] = float(values[number, k])
        yield line
