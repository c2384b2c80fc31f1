"""Published data sets; their own rows are the test, and none of them is copied here."""

import gzip
import json
from pathlib import Path

import pytest

from prefopt.data.audit import Audit
from prefopt.data.read import read_records
from prefopt.records import Comparison, Demonstration, Rating, Record

DATA = Path(__file__).parents[3] / "shared" / "data"


def _read(name: str) -> tuple[list[Record], Audit]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"real data is not here: ../shared/data/{name}")
    audit = Audit()
    records = list(read_records([str(path)], audit=audit))
    assert len(records) + audit.refused == audit.rows
    return records, audit


@pytest.mark.parametrize(
    ("name", "rows", "reasons"),
    [
        (
            "hh-rlhf/helpful-base.test.jsonl.gz",
            2354,
            {"prompts_differ": 9, "roles_out_of_order": 6, "empty_completion": 4, "identical_completions": 2},
        ),
        (
            "hh-rlhf/harmless-base.test.jsonl.gz",
            2312,
            {"prompts_differ": 5, "roles_out_of_order": 4, "empty_completion": 4},
        ),
    ],
)
def test_hh_dialogues(name: str, rows: int, reasons: dict[str, int]) -> None:
    records, audit = _read(name)
    assert audit.rows == rows
    assert audit.reasons == reasons
    assert audit.format.endswith("implicit prompt (transcripts with Human:/Assistant: turns)")
    with gzip.open(DATA / name, "rt") as file:
        lines = file.readlines()
    for record in records:  # nothing of the text is lost but the marks
        assert isinstance(record, Comparison)
        assert record.source.line is not None
        row = json.loads(lines[record.source.line - 1])
        for side in ("chosen", "rejected"):
            turns = (*record.prompt, *getattr(record, side))
            marks = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
            assert "".join(marks[m.role] + m.content for m in turns) == row[side]


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    [
        ("dpo_en_demo", Comparison, "preference pairs (conversations with chosen and rejected)"),
        ("alpaca_en_demo", Demonstration, "demonstrations (alpaca columns)"),
        ("kto_en_demo", Rating, "unpaired rows (messages, label)"),
    ],
)
def test_llama_factory_demos_lose_exact_duplicates_only(name: str, kind: type[Record], layout: str) -> None:
    records, audit = _read(f"llama-factory/{name}.json")
    rows = json.loads((DATA / f"llama-factory/{name}.json").read_text())
    distinct = {json.dumps(row, sort_keys=True) for row in rows}
    assert all(isinstance(record, kind) for record in records)
    assert len(records) == len(distinct)
    assert audit.reasons.keys() <= {"duplicate"}
    assert audit.format == f"read as {layout}"
