"""What happens before training, the same for every recipe: where to compute, which rows, which run."""

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from prefopt.config import DataConfig, TrainConfig, UsableRowsConfig
from prefopt.data.audit import Audit
from prefopt.data.group import CompletionGroup
from prefopt.data.order import split_by_prompt
from prefopt.data.pack import PackedBatch, pack
from prefopt.data.prompts import prompt_groups
from prefopt.data.read import read_prompts, read_records
from prefopt.data.store import GroupStore, token_counts
from prefopt.data.tokenize import Renderer, tokenize
from prefopt.errors import ConfigError, DataError
from prefopt.model.load import LoadedModel, eos_ids, load_model, row_positions, sliding_window
from prefopt.model.logprobs import plain_model
from prefopt.model.paths import PathChoice, choose_path
from prefopt.progress import Bar, progress, say, warn
from prefopt.records import Content, Record, Source
from prefopt.run import RunFolder, check_manifest, file_sha256
from prefopt.train.health import Health

__all__ = [
    "Prompts",
    "Rows",
    "begin_health",
    "begin_run",
    "check_path",
    "device_and_dtype",
    "introduce",
    "length_limit",
    "load",
    "load_named",
    "manifest",
    "read_groups",
    "read_prompt_groups",
    "split_rows",
]

_REFUSED_SHOWN = 8  # prompts; `prefopt check` does not know them without their completions
_CHECK_TOKENS = 2048  # rows of the first batch that are also scored by transformers itself


@dataclass(frozen=True)
class Rows:
    """Tokenised rows on either side of the split, and what became of every row read."""

    train: GroupStore
    held_out: GroupStore
    audit: Audit


def device_and_dtype(dtype: Literal["auto", "float32", "bfloat16"]) -> tuple[torch.device, torch.dtype]:
    """CUDA if there is a GPU, else CPU; auto is bfloat16 there and float32 here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, dtype)


def load(config: DataConfig, dtype: torch.dtype, device: torch.device) -> tuple[LoadedModel, Renderer]:
    """The starting model and the one that turns its conversations into tokens."""
    return load_named(config.model, config.template, dtype, device)


def load_named(
    name: str, template: Literal["auto", "chat", "plain"], dtype: torch.dtype, device: torch.device
) -> tuple[LoadedModel, Renderer]:
    """A language model by its name, and the one that turns conversations into tokens for it."""
    loaded = load_model(name, dtype=dtype, device=device)
    renderer = Renderer(loaded.tokenizer, template=template, eos_ids=eos_ids(name, loaded.tokenizer))
    introduce(name, loaded.model, renderer)
    return loaded, renderer


def introduce(name: str, model: PreTrainedModel, renderer: Renderer) -> None:
    """Say which model was loaded and how it is given text."""
    parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {name} ({type(model).__name__}, {parameters:,} parameters, {model.dtype}, {model.device})")
    say(f"conversations: {renderer.description}")


def read_groups(
    config: UsableRowsConfig,
    model: PreTrainedModel,
    renderer: Renderer,
    select: Callable[[Iterable[Record]], Iterable[Record]],
) -> tuple[GroupStore, Audit]:
    """Read, select what the recipe takes, tokenise; stops when too many rows are refused.

    Rows go through one by one, and their tokens to a temporary file: memory hardly grows with their number.

    Args:
        select: Picks (or converts to) the records a recipe trains on; raises DataError for others.
    """
    audit = Audit()
    records = read_records(config.data, audit=audit, columns=config.columns, split=config.split)
    say(f"data: {audit.format}")
    limit = length_limit(config.max_length, row_positions(model.config))
    prompt_limit = config.max_prompt_length or limit // 2
    with progress("tokenize", total=len(records), unit="rows") as bar:
        taken = select(_counted(records, bar))
        made = tokenize(taken, renderer, max_length=limit, max_prompt_length=prompt_limit, audit=audit)
        groups = GroupStore.write(made)
    say(f"rows: {audit.summary()}")
    audit.enforce(config.max_refused)
    if not groups:
        raise _nothing_left(config, audit)
    return groups, audit


@dataclass(frozen=True)
class Prompts:
    """Prompts as tokens, what each of them says by its row, and what became of every row read."""

    groups: GroupStore
    contents: dict[Source, Content]
    audit: Audit


def read_prompt_groups(config: DataConfig, model: PreTrainedModel, renderer: Renderer, *, new_tokens: int) -> Prompts:
    """Read the distinct prompts of rows of any layout; those that leave no room for a completion are refused.

    Args:
        new_tokens: Room that every prompt must leave.
    """
    audit = Audit()
    found = read_prompts(config.data, audit=audit, columns=config.columns, split=config.split)
    say(f"data: {audit.format}")
    limit = length_limit(config.max_length, row_positions(model.config))
    longest = min(config.max_prompt_length or limit, limit - new_tokens)
    if longest < 1:
        raise ConfigError(
            "max_new_tokens leaves no room for a prompt.",
            where="max_new_tokens",
            got=str(new_tokens),
            expected=f"less than the {limit} tokens of prompt plus completion",
            todo="Lower it, or raise --max-length as far as the model goes.",
        )
    groups = GroupStore.write(prompt_groups(found, renderer, longest=longest, audit=audit))
    say(f"rows: {audit.summary()}; {len(groups):,} prompts")
    for finding in [f for f in audit.findings if f.state == "refused"][:_REFUSED_SHOWN]:
        say(f"  refused {finding.source}: {finding.reason.replace('_', ' ')}: {finding.detail}")
    audit.enforce(config.max_refused, check="--prompts ")
    if not groups:
        raise _nothing_left(config, audit, check="--prompts ")
    kept = {group.source for group in groups}
    return Prompts(groups, {p.source: p.content for p in found if p.source in kept}, audit)


def _nothing_left(config: UsableRowsConfig, audit: Audit, check: str = "") -> DataError:
    return DataError(
        "No usable row is left.",
        where=", ".join(config.data),
        got=audit.summary(),
        expected="at least one row",
        todo=f"`prefopt check {config.data[0]} {check}--model MODEL` shows the reasons row by row.",
    )


def _counted(records: Iterable[Record], bar: Bar) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        yield record
        if number % 256 == 0:
            bar.advance(256)
    bar.advance(bar.total % 256)


def split_rows(config: TrainConfig, groups: GroupStore, audit: Audit) -> Rows:
    """Hold out a share of the prompts."""
    split = split_by_prompt(groups, config.eval_share, config.seed)
    train, held_out = groups.take(split.train), groups.take(split.held_out)
    say(f"split by prompt: {len(train):,} rows to train on, {len(held_out):,} held out")
    if not train:
        raise DataError(
            "Every row is held out.",
            where="eval_share",
            got=f"{config.eval_share} of {len(groups)} rows",
            expected="rows to train on",
            todo="Give more rows or a smaller --eval-share.",
        )
    return Rows(train, held_out, audit)


def length_limit(max_length: int | None, positions: int | None) -> int:
    """Tokens of prompt plus completion: what is asked for, or 1024, within what the model holds."""
    if max_length is None:
        return min(1024, positions or 1024)
    if positions is not None and max_length > positions:
        raise ConfigError(
            "max_length is more than the model holds.",
            where="max_length",
            got=str(max_length),
            expected=f"at most {positions}, the model's positions",
            todo=f"Use --max-length {positions} or less.",
        )
    return max_length


def manifest(config: DataConfig, loaded: LoadedModel) -> dict[str, Any]:
    """What a run was made of: hashes of model, tokenizer, template and data files, and versions."""
    files = [Path(name) for name in config.data]
    return {
        "model": loaded.fingerprint,
        "tokenizer": loaded.tokenizer_fingerprint,
        "template": loaded.template_fingerprint,
        "data": {name: _data_hash(path) for name, path in zip(config.data, files, strict=True)},
        "versions": {
            "prefopt": version("prefopt"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "peft": version("peft"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
    }


def _data_hash(path: Path) -> str:
    if path.is_file():
        return f"sha256:{file_sha256(path)}"
    if path.is_dir():
        return json.dumps({str(p.relative_to(path)): file_sha256(p) for p in sorted(path.rglob("*")) if p.is_file()})
    return "hub"


def begin_run(
    config: TrainConfig, recipe: str, rows: Rows, made_of: dict[str, Any], resumed: RunFolder | None
) -> RunFolder:
    """A new run folder, or the one to resume once it is made of the same things."""
    if resumed is not None:
        check_manifest(resumed.manifest, made_of)
        return resumed
    run = RunFolder.create(config.out, recipe=recipe, config=config, manifest=made_of)
    run.lock()
    counts = {**rows.audit.as_json(), "train": len(rows.train), "held_out": len(rows.held_out)}
    (run.path / "audit.json").write_text(json.dumps(counts, indent=2) + "\n")
    run.event("started", step=0, recipe=recipe)
    return run


def begin_health(run: RunFolder, rows: Rows, beta: float | None, *, resumed: bool) -> Health:
    """What watches the metrics; speaks at once if many rows were cut, unless it has before a resumption."""
    health = Health(beta=beta)
    for warning in health.note_cut(rows.audit.reasons.get("completion_cut", 0), rows.audit.rows):
        if resumed:
            continue
        warn(warning.sentence)
        run.event("warned", step=0, kind=warning.kind, sentence=warning.sentence)
    return health


def check_path(
    model: torch.nn.Module,
    groups: Sequence[CompletionGroup],
    device: torch.device,
    choose: Callable[[torch.nn.Module, PackedBatch], PathChoice] = choose_path,
) -> PathChoice:
    """Score the first rows both ways, say which path the run takes.

    Where the model has windows, a row longer than one is among them, if there is one.

    Args:
        choose: What compares: log-probabilities, or for reward models `choose_score_path`.
    """
    window = sliding_window(plain_model(model).config)
    taken: list[CompletionGroup] = []
    if window is not None:
        lengths = token_counts(groups)
        beyond = np.flatnonzero(lengths > window)
        taken = [groups[int(beyond[np.argmin(lengths[beyond])])]] if len(beyond) else []
    for group in groups:
        if taken and sum(g.tokens for g in taken) + group.tokens > _CHECK_TOKENS:
            break
        taken.append(group)
    choice = choose(model, pack(taken).to(device))
    say(str(choice))
    return choice
