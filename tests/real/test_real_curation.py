"""`prefopt check` on published data sets: what is known to be in them is found, and nothing absurd."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main

DATA = Path(__file__).parents[3] / "shared" / "data"
BENCHES = ("mt-bench/mt_bench_question.jsonl", "alpaca-eval/outputs.text_davinci_003.json")


def _found(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str | Path) -> dict[str, Any]:
    assert main(["check", str(file), *map(str, arguments), "--json"]) == 0
    curation: dict[str, Any] = json.loads(capsys.readouterr().out)["curation"]
    return curation


def _path(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"real data is not here: ../shared/data/{name}")
    return DATA / name


@pytest.mark.parametrize(("name", "longer"), [("helpful-base", True), ("harmless-base", False)])
def test_length_and_refusals_in_hh(name: str, longer: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """People preferred longer answers where they asked for help, shorter ones and refusals where for harm."""
    found = _found(capsys, _path(f"hh-rlhf/{name}.test.jsonl.gz"))
    gap, share = found["lengths"]["gap"], found["lengths"]["longer_is_better"]
    assert gap["low"] > 0 and share["low"] > 0.5 if longer else gap["high"] < 0 and share["high"] < 0.5
    chosen, rejected = (found["refusals"][part]["share"] for part in ("chosen", "rejected"))
    assert chosen < rejected if longer else chosen > rejected
    assert found["near_duplicates"]["rows"] < 0.01 * found["rows"]  # many pairs share a dialogue, few an answer


def test_planted_leaks_in_published_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, (mt_bench, alpaca_eval) = _path("llama-factory/dpo_en_demo.json"), map(_path, BENCHES)
    clean = _found(capsys, pairs, "--against", mt_bench, alpaca_eval)["leaks"]
    assert (clean["evaluation_prompts"], clean["rows"]) == (2 * 80 + 805, 0)

    rows = json.loads(pairs.read_text())
    question = json.loads(mt_bench.read_text().splitlines()[0])["turns"][0]
    instruction = json.loads(alpaca_eval.read_text())[4]["instruction"]
    rows[2]["conversations"][0]["value"] = question.upper()
    rows[7]["conversations"][0]["value"] = instruction
    planted = tmp_path / "planted.json"
    planted.write_text(json.dumps(rows))
    leaks = _found(capsys, planted, "--against", mt_bench, alpaca_eval)["leaks"]["found"]
    assert [(leak["row"], leak["kind"], leak["evaluation"]["row"]) for leak in leaks] == [
        (3, "exact", 1),
        (8, "exact", 5),
    ]


def test_an_evaluation_set_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    file = _path(BENCHES[1])
    found = _found(capsys, file, "--against", file)
    assert found["leaks"]["rows"] == found["rows"]


def test_mojibake_in_stories(capsys: pytest.CaptureFixture[str]) -> None:
    """83 of these 1,000 stories hold quotes that were decoded as Windows-1252."""
    file = _path("tinystories/tinystories_1000.json")
    assert _found(capsys, file)["oddities"]["mojibake"]["completion"]["rows"] == 83
