"""The rows that stay, in a file of their own, and beside it a list of those that do not."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

from prefopt.atomic import write_together
from prefopt.curate.example import Joined
from prefopt.errors import DataError
from prefopt.records import Source

__all__ = ["Written", "dropped_path", "write_clean"]


@dataclass(frozen=True, slots=True)
class Written:
    """What became of all rows: rows = written + dropped."""

    file: Path
    list: Path
    rows: int
    written: int
    dropped: int

    def as_json(self) -> dict[str, Any]:
        """The counts and the files' names."""
        return {**asdict(self), "file": str(self.file), "list": str(self.list)}


def dropped_path(path: Path) -> Path:
    """Where the rows left out of `path` are listed."""
    return path.with_name(f"{path.name}.dropped.jsonl")


def write_clean(path: Path, rows: Iterable[Joined], reason: Callable[[Joined], dict[str, Any] | None]) -> Written:
    """Write rows as they stand in their files, as JSON lines; both files whole, or neither.

    Args:
        path: A `.jsonl` file.
        reason: Why a row is left out, as JSON with at least `reason`; None if it stays.

    Raises:
        DataError: no row would stay, or a row holds what JSON cannot.
    """
    dropped: list[bytes] = []
    written = 0

    def kept() -> Iterator[bytes]:
        nonlocal written
        for row in rows:
            why = reason(row)
            if why is None:
                written += 1
                yield _line(row.values, row.source)
            else:
                place = {"file": row.source.file, "row": row.source.row, "line": row.source.line}
                dropped.append(_line(place | why, row.source))
        if not written:
            raise DataError("No row would be left.", where=str(path), got=f"{len(dropped)} rows, every one dropped")

    write_together({path: kept(), dropped_path(path): dropped})
    return Written(path, dropped_path(path), written + len(dropped), written, len(dropped))


def _line(values: Any, source: Source) -> bytes:
    def plain(value: object) -> str:
        if isinstance(value, date | time):
            return value.isoformat()
        raise DataError(
            "A row cannot be written as JSON.",
            where=str(source),
            got=f"a value of type {type(value).__name__}",
            expected="text, numbers, true, false, null, lists, objects or dates",
        )

    try:
        return json.dumps(values, ensure_ascii=False, default=plain).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8, but its escape can be written
        return json.dumps(values, default=plain).encode() + b"\n"
