"""Data files -> raw rows. A fault in a row costs that row; a fault in the file is a DataError.

JSON, JSON lines, CSV and TSV (each also as `.gz`), Parquet and Arrow. Pickle is never read.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.data.audit import Refusal
from prefopt.data.formats import RECOGNISED
from prefopt.data.json_array import array_elements, checked
from prefopt.errors import DataError

__all__ = [
    "ACCEPTED",
    "MAX_DEPTH",
    "MAX_LINE_BYTES",
    "MAX_TEXT_BYTES",
    "RawRow",
    "file_rows",
    "is_data_file",
    "table_rows",
]

ACCEPTED = ".json .jsonl .ndjson .csv .tsv (each also .gz), .parquet, .arrow, .feather"
MAX_LINE_BYTES = 16 * 2**20  # one row of a text file; characters, in a JSON array
MAX_DEPTH = 64  # lists and objects within each other
MAX_TEXT_BYTES = 64 * 2**30  # a text file once decompressed, read row by row
MAX_JSON_BYTES = 4 * 2**30  # a single JSON object over several lines, which is held in memory whole

_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
_BATCH = 1024  # rows of a table turned into Python objects at a time
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stands in its file, or why it cannot be read; `row` and `line` count from 1."""

    row: int
    line: int | None
    values: Any = None
    fault: Refusal | None = None
    mends: tuple[str, ...] = ()


def _row(row: int, line: int | None, values: Any) -> RawRow:
    """A row that was read, or refused already."""
    return RawRow(row, line, fault=values) if isinstance(values, Refusal) else RawRow(row, line, values)


def _suffix(path: Path) -> str:
    """The suffix that says how to read the file, without `.gz`; "" if it is none of ours."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in _TEXT_SUFFIXES or (suffix in _TABLE_SUFFIXES and not packed) else ""


def is_data_file(path: Path) -> bool:
    """Whether the name is that of a file we read; a dataset's own description files are not."""
    return bool(_suffix(path)) and path.name not in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def file_rows(path: Path, columns: frozenset[str] | None = frozenset()) -> Iterator[RawRow]:
    """Rows of one data file, one at a time.

    Args:
        columns: Columns of a table file to read besides those we know by name; None: all there are.

    Raises:
        DataError: unknown suffix, empty, unreadable, damaged, or beyond a size limit.
    """
    suffix = _suffix(path)
    if not suffix:
        raise DataError(
            "This kind of file is not read.",
            where=str(path),
            got=f"the suffix {''.join(path.suffixes[-2:])!r}" if path.suffix else "no suffix",
            expected=ACCEPTED,
            todo="Convert the file, or rename it if its name is wrong.",
        )
    try:
        if path.stat().st_size == 0:
            raise DataError("The data file is empty.", where=str(path), got="0 bytes", expected="rows")
        if suffix in _TABLE_SUFFIXES:
            yield from _table_file_rows(path, suffix, None if columns is None else RECOGNISED | columns)
        else:
            yield from _text_rows(path, suffix)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("The compressed file is damaged or cut short.", where=str(path), got=str(error)) from error
    except pa.ArrowException as error:
        raise DataError(
            f"This is no readable {suffix} file.", where=str(path), got=str(error).splitlines()[0][:200]
        ) from error
    except OSError as error:
        raise DataError("The data file cannot be read.", where=str(path), got=str(error)) from error


class _Limited(io.RawIOBase):
    """A byte stream that ends in a DataError once it is longer than allowed: a gzip bomb, as a rule."""

    def __init__(self, stream: io.BufferedIOBase, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        if self._read > MAX_TEXT_BYTES:
            raise DataError(
                "The data file is too large.",
                where=str(self._path),
                got=f"more than {MAX_TEXT_BYTES:,} bytes once decompressed",
                todo="Split it, or convert it to Parquet.",
            )
        return len(data)


def _text_rows(path: Path, suffix: str) -> Iterator[RawRow]:
    packed = path.name.lower().endswith(".gz")
    with (
        path.open("rb") as opened,
        gzip.GzipFile(fileobj=opened) if packed else opened as data,
        io.BufferedReader(_Limited(data, path), 2**20) as stream,
    ):
        start = stream.peek(4)[:4]
        if not start:
            raise DataError("The data file is empty.", where=str(path), got="0 bytes decompressed", expected="rows")
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError("The data file is UTF-16.", where=str(path), expected="UTF-8", todo="Convert it to UTF-8.")
        bom = start.startswith(_BOM)
        if bom:
            stream.read(len(_BOM))
        read = _csv_rows if suffix in (".csv", ".tsv") else _json_rows
        rows = read(stream, path, suffix)  # type: ignore[arg-type]  # _Limited lacks what is never called
        for raw in rows:
            yield replace(raw, mends=(*raw.mends, "bom")) if bom and raw.row == 1 else raw


def _json_rows(stream: io.BufferedReader, path: Path, suffix: str) -> Iterator[RawRow]:
    """Rows of a JSON array, of JSON lines (whatever the suffix), or the one row of a single object."""
    space = b""
    while (start := stream.peek(1)) and not start.strip():
        space += stream.read(len(start))
    if start.lstrip().startswith(b"["):
        for n, values in enumerate(array_elements(stream, path, space, MAX_LINE_BYTES, MAX_DEPTH), 1):
            yield _row(n, None, values)
        return
    line, first = 1 + space.count(b"\n"), stream.readline(MAX_LINE_BYTES + 1)
    while first and not first.strip():
        line, first = line + 1, stream.readline(MAX_LINE_BYTES + 1)
    if suffix != ".json" or isinstance(_parsed(RawRow(1, 1), first).values, dict):
        yield from _json_lines(stream, first, line)
        return
    data = b"\n" * (line - 1) + first + _rest(stream, path)
    text = data.decode(errors="surrogateescape")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):  # JSON lines after all, the first of them broken
        yield from _json_lines(io.BytesIO(data), b"", 1)
        return
    yield _row(1, None, checked(values, text))


def _rest(stream: io.BufferedIOBase, path: Path) -> bytes:
    parts = []
    size = 0
    while part := stream.read(MAX_LINE_BYTES):
        parts.append(part)
        size += len(part)
        if size > MAX_JSON_BYTES:
            raise DataError(
                "The JSON file is too large to be held in memory.",
                where=str(path),
                got=f"more than {MAX_JSON_BYTES:,} bytes",
                todo="Convert it to JSON lines (one object a line, .jsonl), which are read row by row.",
            )
    return b"".join(parts)


def _json_lines(stream: io.BufferedIOBase, first: bytes, line: int) -> Iterator[RawRow]:
    """A row per line; blank lines are none. `first` has been read already and stands on `line`."""
    row, data = 0, first or stream.readline(MAX_LINE_BYTES + 1)
    while data:
        if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
            while (more := stream.readline(2**20)) and not more.endswith(b"\n"):
                pass
            row += 1
            yield RawRow(row, line, fault=Refusal("line_too_long", f"more than {MAX_LINE_BYTES:,} bytes"))
        elif data.strip():
            row += 1
            yield _parsed(RawRow(row, line), data)
        line, data = line + 1, stream.readline(MAX_LINE_BYTES + 1)


def _parsed(raw: RawRow, data: bytes) -> RawRow:
    try:
        return replace(raw, values=json.loads(data.decode()))
    except UnicodeDecodeError as error:
        return replace(raw, fault=_bad_utf8(error))
    except RecursionError:
        return replace(raw, fault=Refusal("too_deep", f"nested more than {MAX_DEPTH} levels deep"))
    except ValueError as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return replace(raw, fault=Refusal("invalid_json", detail))


def _bad_utf8(error: UnicodeDecodeError) -> Refusal:
    return Refusal("invalid_utf8", f"byte {error.object[error.start]:#04x} at {error.start + 1}: {error.reason}")


def _csv_rows(stream: io.BufferedIOBase, path: Path, suffix: str) -> Iterator[RawRow]:
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")  # type: ignore[type-var]
    limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.reader(text, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
        header = _header(path, reader)
        n, start = 0, reader.line_num + 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error) or "field larger" in str(error):  # the rows behind are lost
                    raise DataError(
                        "A quoted cell is never closed, or is far too long.", where=f"{path}:{start}", got=str(error)
                    ) from error
                n += 1
                yield RawRow(n, start, fault=Refusal("invalid_csv", str(error)))
            else:
                if cells:  # a blank line is no row
                    n += 1
                    yield _cells(RawRow(n, start), header, cells)
            start = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _header(path: Path, reader: Any) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError("The header cannot be read.", where=f"{path}:1", got=str(error)) from error
    names = [name.strip() for name in header]
    if not names or not all(names) or len(set(names)) < len(names):
        raise DataError(
            "The first line does not name the columns.",
            where=f"{path}:1",
            got=f"{names!r:.200}",
            expected="a header: a name for each column, each only once",
            todo="Put a header line such as prompt,chosen,rejected on top.",
        )
    return names


def _cells(raw: RawRow, header: list[str], cells: list[str]) -> RawRow:
    if len(cells) != len(header):
        detail = f"{len(cells)} cells under {len(header)} columns"
        return replace(raw, fault=Refusal("invalid_csv", detail))
    values = {name: _cell(cell) for name, cell in zip(header, cells, strict=True)}
    return _row(raw.row, raw.line, checked(values, "".join(cells)))


def _cell(cell: str) -> Any:
    """The cell's text; where it is a JSON list of objects, that list: how messages stand in a table of text."""
    if cell.startswith("[{") and cell.endswith("}]"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _table_file_rows(path: Path, suffix: str, wanted: frozenset[str] | None) -> Iterator[RawRow]:
    if suffix == ".parquet":
        with pq.ParquetFile(path) as parquet:
            names = [n for n in parquet.schema_arrow.names if wanted is not None and n in wanted]
            yield from table_rows(parquet.iter_batches(_BATCH, columns=names or None))
        return
    with pa.memory_map(str(path)) as source:
        start = source.read(6)
        source.seek(0)
        if start == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source))
        yield from table_rows(batch.slice(i, _BATCH) for batch in batches for i in range(0, batch.num_rows, _BATCH))


def table_rows(batches: Any) -> Iterator[RawRow]:
    """Rows of Arrow record batches or tables."""
    n = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for values in rows:
            n += 1
            yield _row(n, None, values)


def _arrow_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return _bad_utf8(error)
