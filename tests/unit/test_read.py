"""Files of every kind, and what is wrong with files and their rows."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data import files
from prefopt.data.audit import Audit
from prefopt.data.read import read_records
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison, Demonstration, Message, Rating, Source

ROWS = [
    {"prompt": "Once", "chosen": " upon a time", "rejected": " more"},
    {"prompt": "The cat", "chosen": " sat,\nand slept", "rejected": ' "barked"'},
]
EMPTY = {"prompt": "x", "chosen": " ", "rejected": "y"}


def _read(*sources: Path | str, **options: Any) -> tuple[list[Any], Audit]:
    audit = Audit()
    records = list(read_records([str(s) for s in sources], audit=audit, **options))
    assert audit.rows == audit.kept + audit.mended + audit.refused
    assert len(records) == audit.kept + audit.mended
    return records, audit


def _lines(path: Path, *rows: Any) -> Path:
    """Rows as JSON lines; bytes stand as they are."""
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n")
    return path


def _text(n: int) -> dict[str, str]:
    return {"text": f"story {n}"}


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    name = path.name.removesuffix(".gz")
    table = pa.Table.from_pylist(rows)
    if name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".feather"):
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        plain = path.with_name(name)
        if name.endswith(("csv", "tsv")):
            with plain.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
                writer.writeheader()
                writer.writerows(rows)
        elif name.endswith(".json"):
            plain.write_text(json.dumps(rows, indent=2))
        else:
            _lines(plain, *rows)
        if path != plain:
            path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.json", [None, None]),
        ("a.json.gz", [None, None]),
        ("a.jsonl", [1, 2]),
        ("a.ndjson", [1, 2]),
        ("A.JSONL", [1, 2]),
        ("a.jsonl.gz", [1, 2]),
        ("a.csv", [2, 3]),
        ("a.csv.gz", [2, 3]),
        ("a.tsv", [2, 3]),
        ("a.parquet", [None, None]),
        ("a.arrow", [None, None]),
        ("a.feather", [None, None]),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, lines: list[int | None]) -> None:
    path = tmp_path / name
    _write(path, ROWS)
    records, audit = _read(path)
    assert records == [
        Comparison("Once", " upon a time", " more", Source(str(path), 1, lines[0])),
        Comparison("The cat", " sat,\nand slept", ' "barked"', Source(str(path), 2, lines[1])),
    ]
    assert audit.as_json() == {
        "rows": 2,
        "kept": 2,
        "mended": 0,
        "refused": 0,
        "reasons": {},
        "format": "read as preference pairs of text (prompt, chosen, rejected)",
    }


def test_json_lines_named_json_and_an_array_named_jsonl(tmp_path: Path) -> None:
    lines, array = _lines(tmp_path / "a.json", b"", *ROWS), tmp_path / "b.jsonl"
    array.write_text("\n" + json.dumps(ROWS, indent=1))
    assert [r.source for r in _read(lines)[0]] == [Source(str(lines), 1, 2), Source(str(lines), 2, 3)]
    assert [r.source for r in _read(array)[0]] == [Source(str(array), 1), Source(str(array), 2)]


def test_one_pretty_printed_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert len(_read(path)[0]) == 1


def test_json_lines_named_json_whose_first_line_is_broken(tmp_path: Path) -> None:
    records, audit = _read(_lines(tmp_path / "a.json", b'{"prompt": "x", ', *ROWS))
    assert [r.source.line for r in records] == [2, 3]
    assert audit.reasons == {"invalid_json": 1}


def test_messages_survive_parquet_and_csv(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello!"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "vector": [0.5, 1.0]}]), tmp_path / "a.parquet")
    _write(tmp_path / "a.csv", [{"messages": json.dumps(turns)}])
    for path, line in ((tmp_path / "a.parquet", None), (tmp_path / "a.csv", 2)):
        source = Source(str(path), 1, line)
        expected = Demonstration((Message("user", "Hi?"),), (Message("assistant", "Hello!"),), source)
        assert _read(path)[0] == [expected]


def test_faults_cost_only_their_row_and_name_its_line(tmp_path: Path) -> None:
    deep = b'{"text": ' + b"[" * 70 + b"]" * 70 + b"}"
    deeper = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path = _lines(
        tmp_path / "a.jsonl",
        ROWS[0],
        b"",  # a blank line is no row, and counts as a line
        b'{"prompt": "x", "chosen": "\xff", "rejected": "y"}',
        b'{"prompt": "x", "chosen": ',
        b"\0\0\0\0",
        deep,
        deeper,
        b"1" * 5000,
        EMPTY,
        b'{"prompt": "a\\u0000b", "chosen": "\\ud800", "rejected": "y"}',
        ROWS[1],
    )
    records, audit = _read(path)
    assert [(r.source.row, r.source.line) for r in records] == [(1, 1), (9, 10), (10, 11)]
    assert records[1].prompt == "a\ufffdb"
    found = [(f.source.line, f.state, f.reason) for f in audit.findings]
    assert found == [
        (3, "refused", "invalid_utf8"),
        (4, "refused", "invalid_json"),
        (5, "refused", "invalid_json"),
        (6, "refused", "too_deep"),
        (7, "refused", "too_deep"),
        (8, "refused", "invalid_json"),
        (9, "refused", "empty_completion"),
        (10, "mended", "lone_surrogates"),
        (10, "mended", "nul_characters"),
    ]
    assert (audit.rows, audit.kept, audit.mended, audit.refused) == (10, 2, 1, 7)


def test_a_line_beyond_the_limit_is_refused_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    path = _lines(tmp_path / "a.jsonl", _text(1), {"text": "x" * 3_000_000}, _text(3))
    records, audit = _read(path)
    assert [r.source.line for r in records] == [1, 3]
    assert audit.reasons == {"line_too_long": 1}
    first = _lines(tmp_path / "b.jsonl", {"text": "x" * 200}, _text(2))
    assert [r.source.line for r in _read(first)[0]] == [2]


def test_a_gzip_bomb_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100_000, mtime=0))
    with pytest.raises(DataError, match="too large"):
        _read(path)


def test_an_object_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 50)
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=2))
    with pytest.raises(DataError, match="too large") as caught:
        _read(tmp_path / "a.json")
    assert "JSON lines" in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_taken_off_and_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _write(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    records, audit = _read(path)
    assert records[0].prompt == "Once"
    assert (audit.kept, audit.mended, audit.reasons) == (1, 1, {"bom": 1})


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.arrow"])
def test_invalid_utf8_costs_only_its_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _write(path, [*ROWS, {"prompt": "MARK", "chosen": "a", "rejected": "b"}])
    path.write_bytes(path.read_bytes().replace(b"MARK", b"MA\xffK"))
    records, audit = _read(path)
    assert [r.source.row for r in records] == [1, 2]
    assert audit.reasons == {"invalid_utf8": 1}


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\nx,"y\nz"\nonly one\na,b,c\nq,"r"s\n\nlast,row\n')
    records, audit = _read(path)
    assert [(r.prompt, r.completion, r.source.row, r.source.line) for r in records] == [
        ("x", "y\nz", 1, 2),
        ("last", "row", 5, 8),
    ]
    assert [(f.source.line, f.reason) for f in audit.findings] == [
        (4, "invalid_csv"),
        (5, "invalid_csv"),
        (6, "invalid_csv"),
    ]


def test_a_long_csv_cell_is_read_and_the_limit_of_others_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    _write(tmp_path / "a.csv", [{"text": "x" * 1_000_000}])
    assert len(_read(tmp_path / "a.csv")[0][0].completion) == 1_000_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "no row"),
        ("a.json", b"[]", "no row"),
        ("a.csv", b"prompt,completion\n", "no row"),
        ("a.csv", b"prompt,prompt\nx,y\n", "does not name the columns"),
        ("a.csv", b"prompt,,\nx,y,z\n", "does not name the columns"),
        ("a.csv", b'prompt,completion\nx,"y\nz,w\n', "never closed"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.jsonl.gz", b'{"text": "x"}\n', "damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-20], "damaged"),
        ("a.json", b'[{"text": "x"}, {"te', "not valid JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1 no, not really", "no readable .parquet"),
        ("a.arrow", b"no", "no readable .arrow"),
        ("a.pkl", b"\x80\x04.", "kind of file"),
        ("a.parquet.gz", b"x", "kind of file"),
        ("a", b"x", "kind of file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        _read(path)
    assert str(path) in str(caught.value)


def test_a_broken_array_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[\n{"text": "x"},\n{"text": }\n]')
    with pytest.raises(DataError) as caught:
        _read(path)
    assert caught.value.where == f"{path}:4"


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    _lines(tmp_path / "pairs.jsonl", ROWS[0])
    with pytest.raises(DataError, match="does not exist") as caught:
        _read(tmp_path / "pears.jsonl")
    assert caught.value.got == "no such file or folder; there are pairs.jsonl"
    with pytest.raises(DataError, match="does not exist either"):
        _read(tmp_path / "no" / "pairs.jsonl")


def test_a_hub_name_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hub") as caught:
        _read("nobody/has-this-dataset")
    assert caught.value.where == "nobody/has-this-dataset"


def test_duplicates_and_contradictions(tmp_path: Path) -> None:
    def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    path = _lines(
        tmp_path / "a.jsonl",
        pair("p", "a", "b"),
        pair("p", "a", "b"),  # the first again
        pair("q", "a", "b"),
        pair("q\0", "c", "d"),
        pair("q\0", "d", "c"),  # the opposite of row 4
        pair("q\0", "d", "c"),  # row 5 again, and still the opposite of row 4
        pair("p", "a", "c"),
    )
    records, audit = _read(path)
    assert [r.source.row for r in records] == [1, 3, 7]
    assert [(f.source.row, f.reason) for f in audit.findings if f.state == "refused"] == [
        (2, "duplicate"),
        (5, "contradictory"),
        (4, "contradictory"),
        (6, "contradictory"),
    ]
    assert (audit.kept, audit.mended, audit.refused) == (3, 0, 4)


def test_opposite_labels_contradict_and_text_is_not_a_conversation(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    records, audit = _read(
        _lines(
            tmp_path / "a.jsonl",
            {"prompt": "p", "completion": "a", "label": True},
            {"prompt": "p", "completion": "b", "label": True},
            {"prompt": "p", "completion": "b", "label": False},
            {"messages": turns, "label": False},
        )
    )
    assert [(r.source.row, r.label) for r in records if isinstance(r, Rating)] == [(1, True), (4, False)]
    assert audit.reasons == {"contradictory": 2}


def test_duplicates_are_found_across_files(tmp_path: Path) -> None:
    first, second = _lines(tmp_path / "a.jsonl", _text(1)), _lines(tmp_path / "b.jsonl", _text(1), _text(2))
    records, audit = _read(first, second)
    assert [str(r.source) for r in records] == [f"{first}:1", f"{second}:2"]
    assert audit.findings[0].detail == f"the same as {first}:1"


def test_mixed_layouts_are_said_most_frequent_first(tmp_path: Path) -> None:
    audit = _read(_lines(tmp_path / "a.jsonl", _text(1), *ROWS, {"id": 1, "tag": "x"}))[1]
    assert audit.format == (
        "read as preference pairs of text (prompt, chosen, rejected): 2 rows and as demonstrations (text): 1 rows"
        "; columns left aside: id, tag"
    )
    assert audit.reasons == {"missing_columns": 1}


def test_a_file_without_a_known_layout(tmp_path: Path) -> None:
    records, audit = _read(_lines(tmp_path / "a.jsonl", {"question": "x", "answer": "y"}))
    assert records == []
    assert audit.format == "no layout recognised; columns left aside: question, answer"


def test_column_mapping(tmp_path: Path) -> None:
    row = {"question": "x", "best": "a", "worst": "b", "trust": 2, "prompt": "not this"}
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst", "weight": "trust"}
    path = _lines(tmp_path / "a.jsonl", row)
    assert _read(path, columns=columns)[0] == [Comparison("x", "a", "b", Source(str(path), 1, 1), 2.0)]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert _read(tmp_path / "a.parquet", columns=columns)[0][0].weight == 2.0


def test_a_mapped_body_wins_over_columns_of_other_layouts(tmp_path: Path) -> None:
    row = {"story": "x", "prompt": "p", "chosen": "a", "rejected": "b", "label": True}
    records, audit = _read(_lines(tmp_path / "a.jsonl", row), columns={"text": "story"})
    assert records[0].completion == "x"
    assert audit.format.endswith("columns left aside: prompt, chosen, rejected, label")


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"question": "prompt"}, ConfigError, "'question' is not a column"),
        ({"prompt": "a", "text": "a"}, ConfigError, "mapped twice"),
        ({"prompt": "absent"}, DataError, "prompt=absent"),
    ],
)
def test_wrong_mappings(tmp_path: Path, columns: dict[str, str], error: type[Exception], message: str) -> None:
    path = _lines(tmp_path / "a.jsonl", {"a": "x", "text": "y"})
    with pytest.raises(error, match=message):
        _read(path, columns=columns)


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list([*ROWS, EMPTY]).save_to_disk(tmp_path / "one")
    records, audit = _read(tmp_path / "one")
    assert [str(r.source) for r in records] == [f"{tmp_path / 'one'} row 1", f"{tmp_path / 'one'} row 2"]
    assert audit.reasons == {"empty_completion": 1}


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list
    datasets.DatasetDict({"train": part([_text(1)]), "test": part([_text(2)])}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="several splits") as caught:
        _read(tmp_path / "two")
    assert caught.value.got == "train, test"
    records, _ = _read(tmp_path / "two", split="test")
    assert [(r.completion, str(r.source)) for r in records] == [("story 2", f"{tmp_path / 'two'}[test] row 1")]
    with pytest.raises(DataError, match="no split 'dev'"):
        _read(tmp_path / "two", split="dev")


def test_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    _lines(tmp_path / "part-1.jsonl", _text(1))
    (tmp_path / "more").mkdir()
    _write(tmp_path / "more" / "part-2.parquet", [_text(2)])
    records, _ = _read(tmp_path)
    assert sorted(r.completion for r in records) == ["story 1", "story 2"]


def test_a_folder_named_by_splits(tmp_path: Path) -> None:
    _lines(tmp_path / "train-00000.jsonl", _text(1))
    _lines(tmp_path / "train-00001.jsonl", _text(2))
    (tmp_path / "test").mkdir()
    _lines(tmp_path / "test" / "a.jsonl", _text(3))
    with pytest.raises(DataError, match="several splits") as caught:
        _read(tmp_path)
    assert caught.value.got == "test, train"
    assert [r.completion for r in _read(tmp_path, split="train")[0]] == ["story 1", "story 2"]
    assert [r.completion for r in _read(tmp_path, split="test")[0]] == ["story 3"]


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="no data file") as caught:
        _read(tmp_path)
    assert caught.value.got == "model.safetensors"


def test_a_split_of_a_plain_file_is_an_option_without_effect(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split does nothing"):
        _read(_lines(tmp_path / "a.jsonl", _text(1)), split="train")
