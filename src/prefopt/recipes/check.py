"""The data doctor: read and, if a model is named, tokenise, then print what became of every row and what is in them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.config import CheckConfig, DataConfig
from prefopt.curate.clean import Written, write_clean
from prefopt.curate.curation import Curation
from prefopt.curate.example import Joined, example_of, with_rows
from prefopt.curate.leakage import read_evaluation
from prefopt.curate.wording import lines
from prefopt.data.audit import Audit
from prefopt.data.prompts import Prompt, prompt_groups
from prefopt.data.read import read_prompts, read_records, read_rows
from prefopt.data.tokenize import Renderer, tokenize
from prefopt.errors import DataError
from prefopt.model.load import eos_ids, load_config, load_tokenizer, row_positions
from prefopt.progress import progress, say
from prefopt.records import Record
from prefopt.setup import length_limit

__all__ = ["check"]

_LEAKS_SHOWN = 50
_ROWS_TOLD = 256  # between two words to the bar


def check(config: CheckConfig, *, as_json: bool = False) -> bool:
    """Print the table, a verdict and what was found in usable rows, or one JSON object; True if any row is usable.

    With a model its tokenizer and positions are applied, so that cut and over-long rows count too, and lengths are
    in its tokens.
    """
    audit = Audit()
    against = None if config.against is None else read_evaluation(config.against)
    records: Iterable[Record | Prompt]
    lengths = None
    if config.prompts:
        records = prompts = read_prompts(config.data, audit=audit, columns=config.columns, split=config.split)
        if config.model is not None:
            _tokenize_prompts(prompts, config.model, config, audit)
    else:
        records = rows = read_records(config.data, audit=audit, columns=config.columns, split=config.split)
        if config.model is not None:
            lengths = _tokenize(rows, config.model, config, audit)
    if not as_json:
        print(_shown(audit.table()) + _verdict(audit))
    curation = Curation(against, "words" if lengths is None else "tokens")
    _look(curation, config, records, audit, lengths)
    written = None if config.write is None else _write(config, records, audit, curation)
    if config.report is not None:
        from prefopt.report.curation import write_curation  # brings matplotlib along

        write_curation(config.report, audit, curation, config)
    if as_json:
        outcome = {} if written is None else {"written": written.as_json()}
        print(json.dumps(audit.as_json() | {"curation": curation.as_json() | outcome}, ensure_ascii=False))
    else:
        _print(curation, written)
    return audit.rows > audit.refused


def _look(
    curation: Curation,
    config: CheckConfig,
    records: Iterable[Record | Prompt],
    audit: Audit,
    lengths: Sequence[tuple[int, ...]] | None,
) -> None:
    """Show every usable row to the curation."""
    counted = None if lengths is None else iter(lengths)
    with progress("curation", total=audit.rows, unit="rows") as bar:
        for number, row in enumerate(with_rows(read_rows(config.data, split=config.split), records), 1):
            if row.record is not None and not audit.refusals(row.source):
                curation.add(example_of(row.record), row.values, None if counted is None else next(counted))
            if number % _ROWS_TOLD == 0 or number == audit.rows:
                bar.advance((number - 1) % _ROWS_TOLD + 1)
    if not config.prompts and curation.rows != audit.rows - audit.refused:
        raise DataError(
            "The same rows are read twice.",
            where=", ".join(config.data),
            got=f"{audit.rows - audit.refused:,} usable rows, of which {curation.rows:,} stand for themselves",
            expected="every file once, by itself or in a folder",
        )


def _write(config: CheckConfig, records: Iterable[Record | Prompt], audit: Audit, curation: Curation) -> Written:
    """Write the rows that stay, and the list of those that do not."""
    assert config.write is not None
    dropped = curation.dropped()

    def reason(row: Joined) -> dict[str, Any] | None:
        refusals = audit.refusals(row.source)
        if refusals:
            return {"reason": refusals[0], "reasons": refusals}
        return {"reason": "prompt_repeated"} if row.record is None else dropped.get(row.source)

    return write_clean(config.write, with_rows(read_rows(config.data, split=config.split), records), reason)


def _print(curation: Curation, written: Written | None) -> None:
    """What was found and written, for people."""
    if curation.rows:
        print("\n" + _shown(_findings(curation)), end="")
    for leak in curation.leaks[:_LEAKS_SHOWN]:
        print(f"leak: {leak.source}, {leak.part}: {leak.kind} of {leak.prompt.source}: {leak.text}")
    if len(curation.leaks) > _LEAKS_SHOWN:
        print(f"... and {len(curation.leaks) - _LEAKS_SHOWN:,} more leaks: --json and --report list every one.")
    if written is not None:
        print(
            f"{written.file}: {written.written:,} of {written.rows:,} rows; {written.list} lists {written.dropped:,}."
        )


def _shown(table: Table) -> str:
    console = Console()
    with console.capture() as text:  # rich would answer a closed pipe with an exit code of its own
        console.print(table)
    return text.get()


def _findings(curation: Curation) -> Table:
    table = Table(title=f"Found in {curation.rows:,} usable rows", title_justify="left")
    table.add_column("finding")
    for name in ("rows", "share"):
        table.add_column(name, justify="right")
    table.add_column("what", overflow="fold")
    for line in lines(curation):
        table.add_row(Text(line.name), f"{line.rows:,}", line.share, Text(line.text))
    return table


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


def _tokenize(records: Iterable[Record], model: str, config: CheckConfig, audit: Audit) -> list[tuple[int, ...]]:
    """Tokens in the completions of every row that is used, as they would be trained on; the audit hears of the rest."""
    renderer, limit = _renderer(model, config)
    prompt_limit = config.max_prompt_length or limit // 2
    groups = tokenize(records, renderer, max_length=limit, max_prompt_length=prompt_limit, audit=audit)
    return [tuple(len(completion.ids) for completion in group.completions) for group in groups]


def _verdict(audit: Audit) -> str:
    usable, limit = audit.rows - audit.refused, DataConfig.model_fields["max_refused"].default
    if not usable:
        return "No row is usable."
    verdict = f"{usable:,} of {audit.rows:,} rows are usable."
    if audit.refused > limit * audit.rows:
        verdict += f" Training stops when more than {limit:.0%} are refused, unless --max-refused is raised."
    return verdict
