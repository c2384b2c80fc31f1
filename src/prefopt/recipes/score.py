"""Score completions: log-probabilities, and implicit rewards against a reference, as JSON lines."""

import json
from collections.abc import Iterator, Sequence

import torch

from prefopt.config import ScoreConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, micro_batches, pack
from prefopt.model.load import load_reference
from prefopt.model.logprobs import sequence_logprob_sum
from prefopt.progress import progress
from prefopt.records import Record
from prefopt.run import write_atomically
from prefopt.setup import check_path, device_and_dtype, load, read_groups
from prefopt.train.budget import forward_budget

__all__ = ["score"]


def score(config: ScoreConfig) -> int:
    """Write a line per usable row to `config.out`, in file order; returns how many.

    A line has `row` and `file`, and per completion `logps/*` and `tokens/*`; with a reference also
    `ref_logps/*` and `rewards/*` = beta * (logps - ref_logps). Completions are called `chosen` and
    `rejected` in pairs, `completion` elsewhere.
    """
    device, dtype = device_and_dtype(config.dtype)
    loaded, renderer = load(config, dtype, device)
    groups, _ = read_groups(config, loaded.model, renderer, _any)
    logps = _logps(config, loaded.model, groups, "score", device)
    reference = None
    if config.reference is not None:
        reference_model = load_reference(config.reference, loaded, dtype, device).model
        reference = _logps(config, reference_model, groups, "reference", device)
    lines = "".join(json.dumps(line) + "\n" for line in _lines(config, groups, logps, reference))
    write_atomically(config.out, lines.encode())
    return len(groups)


def _any(records: Sequence[Record]) -> Sequence[Record]:
    return records


@torch.no_grad()
def _logps(
    config: ScoreConfig, model: torch.nn.Module, groups: list[CompletionGroup], label: str, device: torch.device
) -> dict[int, list[float]]:
    """Log-probability sums of each group's completions, by the group's place in `groups`."""
    model.eval()
    path = check_path(model, groups, device).path
    place = {id(group): number for number, group in enumerate(groups)}
    found: dict[int, list[float]] = {}

    def score(batch: PackedBatch) -> torch.Tensor:
        return sequence_logprob_sum(model, batch.to(device), path)

    budget = forward_budget(config.tokens_per_batch, score, groups, device)
    with progress(label, total=len(groups), unit="rows") as bar:
        for part in micro_batches(groups, budget):
            sums = score(pack(part)).tolist()
            for group in part:
                found[place[id(group)]], sums = sums[: len(group.completions)], sums[len(group.completions) :]
            bar.advance(len(part))
    return found


def _lines(
    config: ScoreConfig,
    groups: list[CompletionGroup],
    logps: dict[int, list[float]],
    reference: dict[int, list[float]] | None,
) -> Iterator[dict[str, object]]:
    beta = config.beta if config.beta is not None else 1.0
    for number, group in enumerate(groups):
        names = ("chosen", "rejected") if len(group.completions) == 2 else ("completion",)
        line: dict[str, object] = {"row": group.source.row, "file": group.source.file}
        for k, name in enumerate(names):
            line[f"logps/{name}"] = logps[number][k]
            line[f"tokens/{name}"] = group.completions[k].scored_tokens
            if reference is not None:
                line[f"ref_logps/{name}"] = reference[number][k]
                line[f"rewards/{name}"] = beta * (logps[number][k] - reference[number][k])
        yield line
