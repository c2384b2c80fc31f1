"""The data doctor: read and, if a model is named, tokenise, then print what became of every row."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Console

from prefopt.data.audit import Audit
from prefopt.data.read import read_records
from prefopt.data.tokenize import Renderer, tokenize
from prefopt.errors import ConfigError
from prefopt.model.load import eos_ids, load_config, load_tokenizer, max_positions
from prefopt.progress import say
from prefopt.records import Record
from prefopt.setup import length_limit

__all__ = ["check"]


def check(
    sources: Sequence[str],
    *,
    model: str | None,
    template: Literal["auto", "chat", "plain"],
    max_length: int | None,
    max_prompt_length: int | None,
    columns: Mapping[str, str] | None,
    split: str | None,
    as_json: bool,
) -> bool:
    """Print the table (or one JSON object) of rows kept, mended and refused; True if any is usable.

    Args:
        model: Whose tokenizer and positions are applied, so that cut and over-long rows count too.

    Raises:
        ConfigError: a length or template is given without a model, and would do nothing.
    """
    audit = Audit()
    if model is None:
        _refuse_without_model(template, max_length, max_prompt_length)
    records = read_records(sources, audit=audit, columns=columns, split=split)
    if model is not None:
        _tokenize(records, model, template, max_length, max_prompt_length, audit)
    if as_json:
        print(json.dumps(audit.as_json()))
    else:
        Console(file=sys.stdout).print(audit.table())
    return audit.rows > audit.refused


def _refuse_without_model(template: str, max_length: int | None, max_prompt_length: int | None) -> None:
    given = {"template": template != "auto", "max_length": max_length, "max_prompt_length": max_prompt_length}
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{name} does nothing without a model: lengths and templates are a tokenizer's.",
                where=f"flag --{name.replace('_', '-')}",
                todo="Add --model.",
            )


def _tokenize(
    records: Sequence[Record],
    model: str,
    template: Literal["auto", "chat", "plain"],
    max_length: int | None,
    max_prompt_length: int | None,
    audit: Audit,
) -> None:
    tokenizer, config = load_tokenizer(model), load_config(model)
    renderer = Renderer(tokenizer, template=template, eos_ids=eos_ids(model, tokenizer))
    limit = length_limit(max_length, max_positions(config))
    say(f"conversations: {renderer.description}; at most {limit} tokens")
    tokenize(records, renderer, max_length=limit, max_prompt_length=max_prompt_length or limit // 2, audit=audit)
