"""The counts add up, whatever is found in a row."""

import io

import pytest
from rich.console import Console

from prefopt.data.audit import Audit
from prefopt.errors import DataError
from prefopt.records import Source


def _audit(rows: int) -> Audit:
    audit = Audit()
    for n in range(1, rows + 1):
        audit.row(Source("f.jsonl", n, n))
    return audit


def test_a_row_counts_once_in_its_worst_state() -> None:
    audit = _audit(5)
    first, second = Source("f.jsonl", 1, 1), Source("f.jsonl", 2, 2)
    audit.mend(first, "bom")
    audit.mend(first, "nul_characters")
    audit.refuse(first, "empty_completion")
    audit.mend(first, "prompt_cut")  # a later mend does not bring a refused row back
    audit.mend(second, "bom")
    audit.mend(second, "bom")

    assert (audit.rows, audit.kept, audit.mended, audit.refused) == (5, 3, 1, 1)
    assert audit.reasons == {"bom": 2, "nul_characters": 1, "empty_completion": 1, "prompt_cut": 1}


def test_as_json_has_the_names_scripts_rely_on() -> None:
    audit = _audit(3)
    audit.format = "read as demonstrations (text)"
    audit.refuse(Source("f.jsonl", 3, 3), "invalid_json", "line cut")
    assert audit.as_json() == {
        "rows": 3,
        "kept": 2,
        "mended": 0,
        "refused": 1,
        "reasons": {"invalid_json": 1},
        "format": "read as demonstrations (text)",
    }


def test_counts_stay_exact_when_examples_are_no_longer_kept() -> None:
    audit = _audit(1500)
    for n in range(1, 1501):
        audit.refuse(Source("f.jsonl", n, n), "duplicate")
    assert audit.refused == 1500
    assert audit.reasons == {"duplicate": 1500}
    assert len(audit.findings) == 1000


def test_summary_is_one_line_with_every_reason() -> None:
    audit = _audit(1200)
    audit.mend(Source("f.jsonl", 1, 1), "bom")
    for n in (2, 3):
        audit.refuse(Source("f.jsonl", n, n), "duplicate")
    audit.refuse(Source("f.jsonl", 4, 4), "wrong_type")
    assert audit.summary() == "1,200 read: 1,196 kept, 1 mended (1 bom), 3 refused (2 duplicate, 1 wrong_type)"


def test_table_shows_count_share_and_first_example() -> None:
    audit = _audit(4)
    audit.format = "read as [pairs]"  # square brackets are text here, not markup
    audit.refuse(Source("f.jsonl", 2, 7), "wrong_type", "label is [bold]")
    audit.refuse(Source("f.jsonl", 3, 8), "wrong_type", "another")
    console = Console(width=120, file=io.StringIO())
    console.print(audit.table())
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0].strip() == "read as [pairs]"
    (row,) = [line for line in lines if "wrong_type" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "refused",
        "wrong_type",
        "2",
        "50.0%",
        "f.jsonl:7: label is [bold]",
    ]
    assert "2 kept + 0 mended + 2 refused" in lines[-2]


def test_enforce_stops_above_the_share_and_names_the_first_row() -> None:
    audit = _audit(10)
    audit.refuse(Source("f.jsonl", 4, 4), "identical_completions", "chosen and rejected are the same")
    audit.refuse(Source("f.jsonl", 5, 5), "duplicate")
    audit.enforce(0.2)
    audit.refuse(Source("f.jsonl", 6, 6), "duplicate")
    with pytest.raises(DataError, match=r"30\.0% of the rows") as caught:
        audit.enforce(0.2)
    assert caught.value.where == "first: f.jsonl:4"
    assert caught.value.got is not None
    assert "3 refused (2 duplicate, 1 identical_completions)" in caught.value.got


def test_a_row_without_a_line_is_named_by_its_number() -> None:
    assert str(Source("f.parquet", 12)) == "f.parquet row 12"
