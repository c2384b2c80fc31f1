"""Files, folders and hub names -> records; every row that is not used is told to the audit."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.data.audit import Audit, Refusal
from prefopt.data.files import ACCEPTED, MAX_DEPTH, RawRow, file_rows, is_data_file, table_rows
from prefopt.data.formats import COLUMNS, RECOGNISED, parse_row
from prefopt.data.prompts import Prompt, prompt_of
from prefopt.data.row import Row
from prefopt.data.spool import Records, Seen, identity
from prefopt.errors import ConfigError, DataError
from prefopt.records import Content, Record, Source

__all__ = ["read_prompts", "read_records", "read_rows"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[^a-z]|$)")
_MOST_COLUMNS = 200  # names of unused columns remembered for the message

# A body named in a column mapping hides bodies of other layouts that the rows happen to have.
_HIDDEN = {
    "text": RECOGNISED - {"text", "weight"},
    "completion": frozenset({"chosen", "rejected", "completions", "messages", "conversations", "text"}),
    "messages": frozenset({"text", "completion", "completions", "prompt", "conversations", "instruction"}),
}


def read_records(
    sources: Sequence[str],
    *,
    audit: Audit,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> Records:
    """Usable rows of all sources, in their order.

    Rows of several layouts may be mixed. Exact duplicates of an earlier row are refused, and so
    are both of two rows that contradict each other (the same pair the other way round, or the
    same completion called good and bad).

    Args:
        sources: Data files, folders of data files, folders written by `datasets`, or hub names.
        audit: Told of every row; its `format` is set to what the rows were read as.
        columns: Our column name -> the name it has in the data.
        split: Which split, where a source has several.

    Raises:
        ConfigError: `columns` gives a name that is none of ours, or a column twice; `split`
            where no source has splits.
        DataError: a source is missing, empty, damaged or of unknown kind; a mapped column is in no row.
    """
    mapping = _Mapping(columns or {})
    collected = _Collected(audit)
    for source, raw in _all_rows(sources, split, mapping):
        audit.row(source)
        _take(source, raw, mapping, collected)
    audit.format = collected.format(mapping)
    collected.records.flush()
    return collected.records


def read_prompts(
    sources: Sequence[str],
    *,
    audit: Audit,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> list[Prompt]:
    """The distinct prompts of rows of any layout, in their order; completions are not looked at.

    Arguments and errors as for `read_records`.
    """
    mapping = _Mapping(columns or {})
    layouts: Counter[str | None] = Counter()
    found: dict[Content, Prompt] = {}
    for source, raw in _all_rows(sources, split, mapping):
        audit.row(source)
        if not _readable(source, raw, audit):
            continue
        row = Row(mapping.apply(raw.values))
        try:
            prompt = prompt_of(row, source)
        except Refusal as refusal:
            audit.refuse(source, refusal.reason, refusal.detail)
            continue
        layouts[row.layout] += 1
        _tell_mends(source, row.mends, audit)
        if found.setdefault(prompt.content, prompt) is not prompt:
            audit.mend(source, "prompt_repeated", "every prompt is taken once")
    audit.format = "read as " + (" and as ".join(str(layout) for layout in layouts) or "nothing known")
    return list(found.values())


def read_rows(sources: Sequence[str], *, split: str | None = None) -> Iterator[tuple[Source, RawRow]]:
    """Every row of all sources with every column it has, under the data's own names; faulty rows too.

    Arguments and errors as for `read_records`, whose rows they are, in the same order.
    """
    for name in sources:
        yield from _rows(name, split, None)


def _all_rows(sources: Sequence[str], split: str | None, mapping: "_Mapping") -> Iterator[tuple[Source, RawRow]]:
    """Rows of all sources; what is wrong with a source, the split or the mapping is raised on the way."""
    if split and all(Path(source).is_file() for source in sources):
        raise ConfigError(
            "split does nothing here.", where="split", got=split, expected="a dataset folder or hub name to split"
        )
    for name in sources:
        empty = True
        for row in _rows(name, split, mapping.theirs):
            empty = False
            yield row
        if empty:
            raise DataError("There is no row in the data.", where=name, got="0 rows", expected="at least one row")
    mapping.check_found(sources)


def _tell_mends(source: Source, mends: Iterable[str], audit: Audit) -> None:
    for reason in dict.fromkeys(mends):
        audit.mend(source, reason, "each replaced by U+FFFD")


def _readable(source: Source, raw: RawRow, audit: Audit) -> bool:
    """Whether a row came out of its file whole."""
    for reason in raw.mends:
        audit.mend(source, reason, "byte order mark in front of the file")
    if raw.fault:
        audit.refuse(source, raw.fault.reason, raw.fault.detail)
        return False
    if _too_deep(raw.values):
        audit.refuse(source, "too_deep", f"nested more than {MAX_DEPTH} levels deep")
        return False
    return True


def _take(source: Source, raw: RawRow, mapping: "_Mapping", collected: "_Collected") -> None:
    if not _readable(source, raw, collected.audit):
        return
    parsed = parse_row(mapping.apply(raw.values), source)
    collected.layouts[parsed.layout] += 1
    mapping.used.update(parsed.used)
    _tell_mends(source, parsed.mends, collected.audit)
    if parsed.refusal:
        collected.audit.refuse(source, parsed.refusal.reason, parsed.refusal.detail)
    elif parsed.record:
        collected.add(parsed.record)


def _too_deep(values: Any) -> bool:
    level = [values]
    for _ in range(MAX_DEPTH + 1):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        if not inner:
            return False
        level = [v for values in inner for v in values]
    return True


class _Mapping:
    """Renames columns to ours."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        unknown = [name for name in columns if name not in COLUMNS]
        if unknown:
            raise ConfigError(
                f"{unknown[0]!r} is not a column that can be mapped.",
                where="columns",
                got=", ".join(f"{ours}={theirs}" for ours, theirs in columns.items()),
                expected=f"names among {', '.join(COLUMNS)}, each with the data's name for it",
            )
        twice = [name for name, count in Counter(columns.values()).items() if count > 1]
        if twice:
            raise ConfigError(f"The column {twice[0]!r} is mapped twice.", where="columns", expected="each column once")
        self.columns = dict(columns)
        self.theirs = frozenset(columns.values())
        self._hidden = frozenset().union(*(_HIDDEN.get(name, frozenset()) for name in columns)) - set(columns)
        self._found: set[str] = set()
        self.seen: dict[str, None] = {}
        self.used: set[str] = set()

    def apply(self, values: Any) -> Any:
        """The row under our names."""
        if not isinstance(values, dict):
            return values
        if len(self.seen) < _MOST_COLUMNS:
            self.seen.update(dict.fromkeys(values))
        if not self.columns:
            return values
        self._found.update(self.theirs & values.keys())
        kept = {k: v for k, v in values.items() if k not in self._hidden and k not in self.theirs}
        return kept | {ours: values[theirs] for ours, theirs in self.columns.items() if theirs in values}

    def check_found(self, sources: Iterable[str]) -> None:
        """Refuse a mapping of columns that no row has."""
        missing = [f"{ours}={theirs}" for ours, theirs in self.columns.items() if theirs not in self._found]
        if missing:
            raise DataError(
                f"No row has the column of {', '.join(missing)}.",
                where=", ".join(sources),
                got=f"columns {', '.join(map(repr, list(self.seen)[:20]))}" if self.seen else "no row with columns",
                expected="a mapping from our column name to one of these",
                todo="Correct --columns.",
            )

    def unused(self) -> list[str]:
        """Columns of the data that were not looked into."""
        used = {self.columns.get(name, name) for name in self.used}
        return [str(name) for name in self.seen if name not in used]


class _Collected:
    """Records so far, and what has been seen of them."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self.layouts: Counter[str | None] = Counter()
        self.records = Records()
        self._seen = Seen()

    def add(self, record: Record) -> None:
        """Keep a record, unless an earlier one says the same or the opposite."""
        key, way = identity(record)
        earlier = self._seen.first(key, way, self.records.written, record.source)
        if earlier is None:
            self.records.append(record)
        elif way == earlier.way:
            self.audit.refuse(record.source, "duplicate", f"the same as {earlier.source}")
        else:
            self.audit.refuse(record.source, "contradictory", f"the opposite of {earlier.source}")
            self.audit.refuse(earlier.source, "contradictory", f"the opposite of {record.source}")
            self.records.drop(earlier.place)

    def format(self, mapping: _Mapping) -> str:
        """What the rows were read as, the most frequent layout first."""
        known = [(layout, n) for layout, n in self.layouts.most_common() if layout]
        text = f"read as {known[0][0]}" if known else "no layout recognised"
        if len(known) > 1:
            text = "read as " + " and as ".join(f"{layout}: {n:,} rows" for layout, n in known)
        if self.audit.rows and (unused := mapping.unused()):
            text += f"; columns left aside: {', '.join(unused[:6])}" + (", ..." if len(unused) > 6 else "")
        return text


def _rows(name: str, split: str | None, wanted: frozenset[str] | None) -> Iterator[tuple[Source, RawRow]]:
    """Rows of one source, whatever it is; of tables the `wanted` columns and those we know by name, None: all."""
    path = Path(name)
    if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        yield from _saved_dataset(path, split, wanted)
    elif path.is_dir():
        for file in _folder_files(path, split):
            yield from _file(file, wanted)
    elif path.exists():
        yield from _file(path, wanted)
    elif _HUB_NAME.fullmatch(name) and not is_data_file(path) and path.suffix != ".gz" and not path.parent.exists():
        yield from _hub_dataset(name, split, wanted)
    else:
        raise DataError(
            "The data file does not exist.",
            where=name,
            got="no such file or folder" + _neighbours(path),
            expected=f"a file ({ACCEPTED}), a folder of them, a datasets folder, or a hub name (owner/name)",
        )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file() and is_data_file(p))
    return f"; there are {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "") if names else ""


def _file(path: Path, wanted: frozenset[str] | None) -> Iterator[tuple[Source, RawRow]]:
    for raw in file_rows(path, wanted):
        yield Source(str(path), raw.row, raw.line), raw


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    """Data files of a folder and its subfolders, hidden ones apart; of one split where they are named by split."""
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and is_data_file(p) and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not files:
        names = sorted(p.name for p in folder.iterdir())
        raise DataError(
            "The folder holds no data file.",
            where=str(folder),
            got=", ".join(names[:8]) or "an empty folder",
            expected=f"files among {ACCEPTED}, or a folder written by datasets' save_to_disk",
        )
    splits = {p: match.group() if (match := _split_of(p.relative_to(folder))) else None for p in files}
    if split:
        chosen = [p for p in files if splits[p] == split]
        if not chosen:
            raise _no_split(str(folder), split, sorted({s for s in splits.values() if s}))
        return chosen
    if len(set(splits.values())) > 1:
        raise _no_split(str(folder), None, sorted({s or "(none)" for s in splits.values()}))
    return files


def _split_of(path: Path) -> re.Match[str] | None:
    """The split that a file's or its folder's name begins with."""
    found = (_SPLIT.match(part.lower()) for part in reversed(path.parts))
    return next((match for match in found if match), None)


def _no_split(where: str, split: str | None, known: Sequence[str]) -> DataError:
    return DataError(
        f"There is no split {split!r}." if split else "The data has several splits.",
        where=where,
        got=", ".join(known) or "no files named by split",
        expected="one of them",
        todo="Name it with --split.",
    )


def _saved_dataset(path: Path, split: str | None, wanted: frozenset[str] | None) -> Iterator[tuple[Source, RawRow]]:
    import datasets  # slow to import, and most data is plain files

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("The datasets folder cannot be read.", where=str(path), got=f"{error!s:.300}") from error
    yield from _dataset_rows(dataset, str(path), split, wanted)


def _hub_dataset(name: str, split: str | None, wanted: frozenset[str] | None) -> Iterator[tuple[Source, RawRow]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            "There is no such file or folder, and no such dataset can be loaded from the hub.",
            where=name,
            got=f"{error!s:.300}",
            expected=f"a file ({ACCEPTED}), a folder of them, a datasets folder, or a hub name (owner/name)",
            todo="Check the spelling and the connection; downloaded data can be named by its files.",
        ) from error
    yield from _dataset_rows(dataset, name if split is None else f"{name}[{split}]", None, wanted)


def _dataset_rows(
    dataset: Any, name: str, split: str | None, wanted: frozenset[str] | None
) -> Iterator[tuple[Source, RawRow]]:
    """Rows of a `Dataset`, or of the one split of a `DatasetDict`."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if split is None and len(dataset) > 1 or split and split not in dataset:
            raise _no_split(name, split, list(dataset))
        split = split or next(iter(dataset))
        dataset, name = dataset[split], f"{name}[{split}]"
    elif split and str(dataset.split) != split:
        raise _no_split(name, split, [str(dataset.split)] if dataset.split else [])
    names = [n for n in dataset.column_names if wanted is not None and n in RECOGNISED | wanted]
    table = (dataset.select_columns(names) if names else dataset).with_format("arrow")
    for raw in table_rows(table.iter(1024)):
        yield Source(name, raw.row), raw
