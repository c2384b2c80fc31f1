"""Score completions: log-probabilities, and implicit rewards against a reference, as JSON lines."""

import json
from collections.abc import Iterable, Iterator

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
    `rejected` in pairs, `completion` where there is one, and 1, 2, ... in rankings of three and more.
    """
    device, dtype = device_and_dtype(config.dtype)
    loaded, renderer = load(config, dtype, device)
    groups, _ = read_groups(config, loaded.model, renderer, _any)
    logps = _logps(config, loaded.model, groups, "score", device)
    reference = None
    if config.reference is not None:
        reference_model = load_reference(config.reference, loaded, dtype, device).model
        reference = _logps(config, reference_model, groups, "reference", device)
    lines = (json.dumps(line).encode() + b"\n" for line in _lines(config, groups, logps, reference))
    write_atomically(config.out, lines)
    return len(groups)


def _any(records: Iterable[Record]) -> Iterable[Record]:
    return records


@torch.no_grad()
def _logps(
    config: ScoreConfig, model: torch.nn.Module, groups: GroupStore, label: str, device: torch.device
) -> Float64[np.ndarray, "rows completions"]:
    """Log-probability sums of each group's completions; NaN where a group has fewer than others."""
    model.eval()
    path = check_path(model, groups, device).path

    def score(batch: PackedBatch) -> torch.Tensor:
        return sequence_logprob_sum(model, batch, path)

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


def _lines(
    config: ScoreConfig,
    groups: GroupStore,
    logps: Float64[np.ndarray, "rows completions"],
    reference: Float64[np.ndarray, "rows completions"] | None,
) -> Iterator[dict[str, object]]:
    beta = config.beta if config.beta is not None else 1.0
    for number, group in enumerate(groups):
        k = len(group.completions)
        names = {1: ["completion"], 2: ["chosen", "rejected"]}.get(k, [str(place + 1) for place in range(k)])
        line: dict[str, object] = {"row": group.source.row, "file": group.source.file}
        for k, name in enumerate(names):
            own = float(logps[number, k])
            line[f"logps/{name}"] = own
            line[f"tokens/{name}"] = group.completions[k].scored_tokens
            if reference is not None:
                other = float(reference[number, k])
                line[f"ref_logps/{name}"] = other
                line[f"rewards/{name}"] = beta * (own - other)
        yield line
