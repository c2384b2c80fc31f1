"""Validated rows with provenance: what reading produces and tokenising consumes.

A row's content is either plain text (`str`: continue this) or a conversation (a tuple of
`Message`). Prompt and completions of one record are of the same kind. An empty prompt is `""`
or `()`. Every record knows the row it came from.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Comparison", "Content", "Demonstration", "Message", "Ranking", "Rating", "Record", "Role", "Source"]

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Content = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row stands.

    `row` counts rows from 1 as they stand in the file; `line` is the line a text format has it
    on, or None where rows have no lines (Parquet, Arrow, a JSON array).
    """

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file} row {self.row}"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with the one completion to imitate.

    `cut`, here and below, says of each completion whether it broke off at a length limit: its end is then
    not its own, and not trained. Empty where nothing says so.
    """

    prompt: Content
    completion: Content
    source: Source
    weight: float = 1.0
    cut: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt with two completions, one preferred; `weight` multiplies its loss.

    `probability` is a judge's that `chosen` is the better one. `margin` says by how much, in the units
    of a reward model's scores.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    source: Source
    weight: float = 1.0
    probability: float = 1.0
    margin: float = 0.0
    cut: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Rating:
    """A prompt with one completion that somebody called good (`label`) or bad: an unpaired row.

    `probability` is a judge's that the label is right.
    """

    prompt: Content
    completion: Content
    label: bool
    source: Source
    weight: float = 1.0
    probability: float = 1.0
    cut: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt with two or more completions, the best first."""

    prompt: Content
    completions: tuple[Content, ...]
    source: Source
    weight: float = 1.0
    cut: tuple[bool, ...] = ()


Record = Demonstration | Comparison | Rating | Ranking
