"""What curation looks at in a row: the turns of its prompt and its completions, each by its name, as text."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.data.files import RawRow
from prefopt.data.prompts import Prompt
from prefopt.errors import DataError
from prefopt.records import Comparison, Content, Demonstration, Ranking, Rating, Record, Source

__all__ = ["Example", "Joined", "example_of", "with_rows"]


@dataclass(frozen=True, slots=True)
class Example:
    """A usable row as texts.

    Attributes:
        kind: "pair", "ranking", "good", "bad", "demonstration" or "prompt".
        prompt: Its turns, system messages apart.
        completions: By name: "chosen" and "rejected"; "1", "2", ... of a ranking; "good" or "bad"; "completion".
        prompt_key: A hash that rows of the same prompt share.
    """

    source: Source
    kind: str
    prompt: tuple[str, ...]
    completions: Mapping[str, str]
    prompt_key: bytes


def example_of(record: Record | Prompt) -> Example:
    """The texts of a record."""
    match record:
        case Prompt():
            return _example(record.source, "prompt", record.content, {})
        case Comparison():
            both = {"chosen": record.chosen, "rejected": record.rejected}
            return _example(record.source, "pair", record.prompt, both)
        case Ranking():
            ranked = {str(i): completion for i, completion in enumerate(record.completions, 1)}
            return _example(record.source, "ranking", record.prompt, ranked)
        case Rating():
            kind = "good" if record.label else "bad"
            return _example(record.source, kind, record.prompt, {kind: record.completion})
        case Demonstration():
            return _example(record.source, "demonstration", record.prompt, {"completion": record.completion})


def _example(source: Source, kind: str, prompt: Content, completions: Mapping[str, Content]) -> Example:
    texts = {name: "\n".join(_turns(completion)) for name, completion in completions.items()}
    key = hashlib.blake2b(repr(prompt).encode(errors="surrogatepass"), digest_size=12).digest()
    return Example(source, kind, _turns(prompt), texts, key)


def _turns(content: Content) -> tuple[str, ...]:
    if isinstance(content, str):
        return (content,) if content else ()
    return tuple(message.content for message in content if message.role != "system")


@dataclass(frozen=True, slots=True)
class Joined:
    """A row as it stands in its file, and what was read from it; None where nothing was."""

    source: Source
    values: Any
    record: Record | Prompt | None


def with_rows(rows: Iterable[tuple[Source, RawRow]], records: Iterable[Record | Prompt]) -> Iterator[Joined]:
    """Every row with its record.

    Args:
        records: In the order of the rows.

    Raises:
        DataError: records are left over, so the files are not what was read before.
    """
    waiting = iter(records)
    record = next(waiting, None)
    for source, raw in rows:
        mine = record if record is not None and record.source == source else None
        yield Joined(source, raw.values, mine)
        if mine is not None:
            record = next(waiting, None)
    if record is not None:
        raise DataError(
            "The data changed while it was read.",
            where=str(record.source),
            got="a row less than before",
            expected="files that nobody writes to",
            todo="Run the command again when they are whole.",
        )
