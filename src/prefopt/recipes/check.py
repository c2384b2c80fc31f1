"""The data doctor: read and, if a model is named, tokenise, then print what became of every row."""

import json
from collections.abc import Iterable

from rich.console import Console

from prefopt.config import CheckConfig, DataConfig
from prefopt.data.audit import Audit
from prefopt.data.prompts import Prompt, prompt_groups
from prefopt.data.read import read_prompts, read_records
from prefopt.data.tokenize import Renderer, tokenize
from prefopt.model.load import eos_ids, load_config, load_tokenizer, row_positions
from prefopt.progress import say
from prefopt.records import Record
from prefopt.setup import length_limit

__all__ = ["check"]


def check(config: CheckConfig, *, as_json: bool = False) -> bool:
    """Print the table and a verdict, or one JSON object; True if any row is usable.

    With a model its tokenizer and positions are applied, so that cut and over-long rows count too.
    """
    audit = Audit()
    if config.prompts:
        prompts = read_prompts(config.data, audit=audit, columns=config.columns, split=config.split)
        if config.model is not None:
            _tokenize_prompts(prompts, config.model, config, audit)
    else:
        records = read_records(config.data, audit=audit, columns=config.columns, split=config.split)
        if config.model is not None:
            _tokenize(records, config.model, config, audit)
    if as_json:
        print(json.dumps(audit.as_json(), ensure_ascii=False))
    else:
        console = Console()
        with console.capture() as table:  # rich would answer a closed pipe with an exit code of its own
            console.print(audit.table())
        print(table.get() + _verdict(audit))
    return audit.rows > audit.refused


def _renderer(model: str, config: CheckConfig) -> tuple[Renderer, int]:
    """How text becomes tokens, and how many of them a row may have."""
    tokenizer, shape = load_tokenizer(model), load_config(model)
    renderer = Renderer(tokenizer, template=config.template, eos_ids=eos_ids(model, tokenizer))
    limit = length_limit(config.max_length, row_positions(shape))
    say(f"conversations: {renderer.description}; at most {limit} tokens")
    return renderer, limit


def _tokenize_prompts(prompts: Iterable[Prompt], model: str, config: CheckConfig, audit: Audit) -> None:
    renderer, limit = _renderer(model, config)
    longest = min(config.max_prompt_length or limit, limit - 1)  # at least one token of a completion
    for _ in prompt_groups(prompts, renderer, longest=longest, audit=audit):
        pass  # the audit is told of every row


def _tokenize(records: Iterable[Record], model: str, config: CheckConfig, audit: Audit) -> None:
    renderer, limit = _renderer(model, config)
    prompt_limit = config.max_prompt_length or limit // 2
    for _ in tokenize(records, renderer, max_length=limit, max_prompt_length=prompt_limit, audit=audit):
        pass  # the audit is told of every row


def _verdict(audit: Audit) -> str:
    usable, limit = audit.rows - audit.refused, DataConfig.model_fields["max_refused"].default
    if not usable:
        return "No row is usable."
    verdict = f"{usable:,} of {audit.rows:,} rows are usable."
    if audit.refused > limit * audit.rows:
        verdict += f" Training stops when more than {limit:.0%} are refused, unless --max-refused is raised."
    return verdict
