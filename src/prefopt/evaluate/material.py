"""What an experiment is made of: prompts to train and to measure on, and pairs of samples that the truth labels."""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from prefopt.config import DataConfig
from prefopt.config.frontier import PromptsConfig
from prefopt.data.audit import Audit
from prefopt.data.prompts import prompt_groups
from prefopt.data.read import read_prompts, read_records
from prefopt.data.tokenize import Renderer
from prefopt.errors import DataError, RunError
from prefopt.evaluate.sampled import pair_columns
from prefopt.model.load import eos_ids, load_config, load_tokenizer, max_positions
from prefopt.progress import say
from prefopt.records import Content, Demonstration, Message
from prefopt.run import file_sha256, write_atomically
from prefopt.sampling.completions import Completed

__all__ = ["PromptFiles", "all_pairs", "as_json_lines", "make_prompts", "read_back"]


@dataclass(frozen=True)
class PromptFiles:
    """Prompts to train on and others to measure on, and what tells these apart from others."""

    train: Path
    test: Path
    test_hash: str


def make_prompts(config: PromptsConfig, model: str, out: Path, *, room: int) -> PromptFiles:
    """Write the prompts of an experiment, the same ones for every seed and method.

    The distinct prompts are shuffled once and for all; the first ones are the test prompts.

    Args:
        model: Whose tokens a prompt is measured in.
        room: Tokens that a prompt has to leave.

    Raises:
        DataError: there are too few prompts, or rows to take beginnings of are no texts.
        RunError: `out` holds other prompts already.
    """
    if config.words is None and config.tokens is None:
        found = _fitting(config, model, room)
    else:
        found = list(dict.fromkeys(_beginnings(config, model)))
    if len(found) < config.test + config.train:
        raise DataError(
            "There are too few distinct prompts.",
            where=", ".join(config.data),
            got=f"{len(found):,}",
            expected=f"{config.train:,} to train on and {config.test:,} to measure on",
            todo="Ask for fewer, or for longer beginnings, of which more are distinct.",
        )
    random.Random("prompts").shuffle(found)
    test, train = found[: config.test], found[config.test : config.test + config.train]
    files = out / "prompts-train.jsonl", out / "prompts-test.jsonl"
    for file, prompts in zip(files, (train, test), strict=True):
        _write_once(file, as_json_lines({"prompt": _plain(prompt)} for prompt in prompts))
    return PromptFiles(*files, test_hash=file_sha256(files[1]))


def _fitting(config: PromptsConfig, model: str, room: int) -> list[Content]:
    """The rows' own prompts; those that leave no room for a sample are refused, and all is told."""
    audit, tokenizer = Audit(), load_tokenizer(model)
    found = read_prompts(config.data, audit=audit)
    limit = max_positions(load_config(model))
    longest = sys.maxsize if limit is None else limit - room
    renderer = Renderer(tokenizer, eos_ids=eos_ids(model, tokenizer))
    kept = {group.source for group in prompt_groups(found, renderer, longest=longest, audit=audit)}
    say(f"prompts: {audit.summary()}")
    audit.enforce(DataConfig.model_fields["max_refused"].default, check="--prompts ")
    return [prompt.content for prompt in found if prompt.source in kept]


def read_back(file: Path) -> list[Content]:
    """The prompts that `make_prompts` wrote."""
    return [prompt.content for prompt in read_prompts([str(file)], audit=Audit())]


def all_pairs(
    prompts: Sequence[Content], drawn: Sequence[Sequence[Completed]], rewards: Float64[np.ndarray, "prompts samples"]
) -> list[dict[str, Any]]:
    """Every pair of different samples of a prompt, the one of more reward chosen; ties are left out."""
    rows = []
    for prompt, group, scores in zip(prompts, drawn, rewards.tolist(), strict=True):
        distinct = {sample.text: (sample, score) for sample, score in zip(group, scores, strict=True)}
        for (one, mine), (other, theirs) in combinations(distinct.values(), 2):
            if mine != theirs:
                chosen, rejected = (one, other) if mine > theirs else (other, one)
                rows.append({"prompt": _plain(prompt), **pair_columns(chosen, rejected)})
    return rows


def as_json_lines(rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _beginnings(config: PromptsConfig, model: str) -> Iterator[str]:
    """Of every text that goes on behind its beginning."""
    tokenizer = load_tokenizer(model) if config.tokens else None
    lengths, audit = random.Random("lengths"), Audit()
    records = read_records(config.data, audit=audit)
    say(f"texts: {audit.summary()}")
    for record in records:
        if not isinstance(record, Demonstration) or not isinstance(record.completion, str):
            raise DataError(
                "Beginnings can be taken of texts only.",
                where=str(record.source),
                got=f"a {type(record).__name__.lower()}",
                expected="rows with text",
                todo="Leave words and tokens out of prompts: then the rows' own prompts are taken.",
            )
        text = f"{record.prompt}{record.completion}"
        if config.tokens and tokenizer is not None:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            length = lengths.randint(*config.tokens)
            start = str(tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False))
            start = start if len(ids) > length and "\ufffd" not in start else ""  # half a character
        else:
            words = text.split()
            start = " ".join(words[: config.words]) if len(words) > (config.words or 0) else ""
        if start.strip():
            yield start


def _plain(content: Content) -> str | list[dict[str, str]]:
    return content if isinstance(content, str) else [_turn(message) for message in content]


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _write_once(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() != content:
        raise RunError(
            "The folder holds another experiment's prompts.",
            where=str(path),
            got="other prompts than this configuration makes",
            expected="the same prompts, for points that can be compared",
            todo="Choose another out, or put prompts and their data back as they were.",
        )
    if not path.exists():
        write_atomically(path, content)
