"""`prefopt check` through the command line: what it finds, says and writes."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.cli import main
from tiny import save_tiny_model

BENCH = "Describe how a sailing boat can move against the wind without any engine at all."
LONG = (
    "The keel keeps the boat from sliding sideways, the sail works as a wing, and what is left of the force points a "
    "little forward, so the crew goes left and right in turn until the harbour upwind comes into reach at last."
)
OTHER = "Nobody knows. It is one of those things that sailors learn from their parents and never talk about to anyone."
ROWS: list[Any] = [
    {"prompt": "How do boats sail upwind?", "chosen": LONG, "rejected": OTHER, "source": "a", "score_chosen": 9},
    {"prompt": "How do boats sail upwind??", "chosen": LONG + " Yes.", "rejected": OTHER, "source": "b"},
    {"prompt": BENCH.upper(), "chosen": "By tacking.", "rejected": "I cannot help with that.", "source": "a"},
    {
        "prompt": "Name a caf\u00c3\u00a9.",
        "chosen": "Sacher.",
        "rejected": "Hawelka, in a small street.",
        "source": "a",
    },
    {"prompt": "Say it.", "chosen": "yes", "rejected": "yes"},
    {"prompt": "How do boats sail upwind?", "chosen": LONG, "rejected": OTHER, "source": "c"},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write(tmp_path / "bench.jsonl", [{"question_id": 81, "turns": [BENCH, "Now say it in one line."]}])


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["check", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    curation: dict[str, Any] = json.loads(check(capsys, *arguments, "--json"))["curation"]
    return curation


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["check", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_as_json(pairs: Path, bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = json.loads(check(capsys, pairs, "--against", bench, "--json"))
    curation = out.pop("curation")
    reasons = {"identical_completions": 1, "duplicate": 1}
    what = "read as preference pairs of text (prompt, chosen, rejected); columns left aside: source, score_chosen"
    assert out == {"rows": 6, "kept": 4, "mended": 0, "refused": 2, "reasons": reasons, "format": what}

    def at(row: int, file: Path = pairs) -> dict[str, Any]:
        return {"file": str(file), "row": row, "line": row}

    lengths = curation.pop("lengths")
    assert curation == {
        "rows": 4,
        # LONG has 43 words, so 39 runs of 5, and one more with a word more.
        "near_duplicates": {"threshold": 0.8, "rows": 1, "found": [at(2) | {"of": at(1), "similarity": 0.975}]},
        "near_contradictions": {"threshold": 0.8, "rows": 0, "found": []},
        "leaks": {
            "evaluation_prompts": 2,
            "rows": 1,
            "found": [
                at(3)
                | {"part": "prompt", "kind": "exact", "text": BENCH.lower().rstrip("."), "evaluation": at(1, bench)}
            ],
        },
        "refusals": {"rejected": {"of": 4, "share": 0.25, "rows": 1, "first": at(3), "detail": "i cannot"}},
        "oddities": {"mojibake": {"prompt": {"rows": 1, "first": at(4)}}},
        "scripts": {"prompt": {"latin": 4}, "chosen": {"latin": 4}, "rejected": {"latin": 4}},
        "other_script": None,
        "origins": {"source": {"a": 3, "b": 1}},
        "scores": {"score_chosen": {"rows": 1, "odd": 0, "mean": 9, "sd": 0, "quartiles": [9] * 5}},
        "score_order": {},
        "score_below": [],
        "score_critique_conflicts": {"critiques": 0, "rows": 0, "found": []},
    }
    # Words: 43 and 20, 44 and 20, 2 and 5, 1 and 5; 2 of 4 chosen are longer.
    assert (lengths["unit"], lengths["pairs"], lengths["prompts"], lengths["equal"]) == ("words", 4, 4, 0)
    assert (lengths["better"], lengths["worse"]) == (90 / 4, 50 / 4)
    assert lengths["gap"]["value"] == 10 and lengths["longer_is_better"]["value"] == 0.5


def test_the_table_comes_first_then_what_was_found(
    pairs: Path, bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    out = check(capsys, pairs, "--against", bench).splitlines()
    begin = next(i for i, line in enumerate(out) if line.startswith("4 of 6 rows are usable."))
    assert out[begin + 2].startswith("Found in 4 usable rows")
    said = [" ".join(line.replace("│", " ").split()) for line in out[begin + 3 :]]
    assert f"near duplicates 1 25.0% {pairs}:2 is nearly {pairs}:1 (0.97)" in said
    assert "leaks 1 25.0% 1 of 2 evaluation prompts" in said
    assert "column source 4 a 75.0%, b 25.0%" in said
    assert f"refusals in rejected, suspected 1 25.0% first: {pairs}:3, 'i cannot'" in said
    assert out[-1] == f"leak: {pairs}:3, prompt: exact of {bench}:1: {BENCH.lower().rstrip('.')}"


def test_more_leaks_than_a_terminal_shows_are_counted(
    tmp_path: Path, bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": BENCH, "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(53)]
    file = write(tmp_path / "leaky.jsonl", rows)
    out = check(capsys, file, "--against", bench)
    assert out.count("\nleak: ") == 50
    assert out.splitlines()[-1] == "... and 3 more leaks: --json and --report list every one."
    assert len(found(capsys, file, "--against", bench)["leaks"]["found"]) == 53


# --- evaluation sets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"turns": ["Another question.", BENCH]},
        {"instruction": BENCH, "output": "...", "generator": "g", "dataset": "d"},
        {"question": BENCH, "best_answer": "Tacking."},
        {"prompt": BENCH},
        {"messages": [{"role": "user", "content": BENCH}, {"role": "assistant", "content": "Tack."}]},
        {"prompt": f"\n\nHuman: {BENCH}\n\nAssistant:", "chosen": " a", "rejected": " b"},
    ],
)
def test_layouts_of_evaluation_sets(
    row: dict[str, Any], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaks = found(capsys, pairs, "--against", write(tmp_path / "set.jsonl", [row]))["leaks"]
    assert [leak["row"] for leak in leaks["found"]] == [3]


def test_truthful_qa_as_a_table(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "TruthfulQA.csv"
    file.write_text(f'Type,Category,Question,Best Answer\nAdversarial,Sailing,"{BENCH}",Tacking\n')
    assert found(capsys, pairs, "--against", file)["leaks"]["rows"] == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"answer": "42"}', "missing_columns"),
        ('{"turns": []}', "turns is not a list of texts"),
        ('{"question": 5}', "question is a number, not text"),
        ('{"prompt": "a"', "invalid_json"),
        ("[1]", "missing_columns"),
    ],
)
def test_an_evaluation_row_without_a_prompt_is_an_error(
    row: str, said: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{row}\n')
    err = mistake(capsys, pairs, "--against", file)
    assert "A row of the evaluation set has no prompt." in err
    assert f"{file}:2" in err and said in err


def test_a_missing_evaluation_set(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "The data file does not exist." in mistake(capsys, pairs, "--against", tmp_path / "none.jsonl")


# --- what is written -------------------------------------------------------------------------------


def test_clean_rows_and_dropped_ones(
    pairs: Path, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, dropped = tmp_path / "clean.jsonl", tmp_path / "clean.jsonl.dropped.jsonl"
    out = check(capsys, pairs, "--against", bench, "--write", clean)
    assert out.splitlines()[-1] == f"{clean}: 2 of 6 rows; {dropped} lists 4."
    assert lines_of(clean) == [ROWS[0], ROWS[3]]
    assert [(line["row"], line["reason"]) for line in lines_of(dropped)] == [
        (2, "near_duplicate"),
        (3, "leak"),
        (5, "identical_completions"),
        (6, "duplicate"),
    ]
    first, second, *_ = lines_of(dropped)
    assert first["of"] == f"{pairs}:1" and second["evaluation"] == f"{bench}:1"

    again = json.loads(check(capsys, clean, "--against", bench, "--json"))
    assert (again["kept"], again["refused"]) == (2, 0)
    assert again["curation"]["near_duplicates"]["rows"] == again["curation"]["leaks"]["rows"] == 0


def test_counts_add_up_and_json_has_them(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = found(capsys, pairs, "--write", tmp_path / "c.jsonl")["written"]
    assert written == {
        "file": str(tmp_path / "c.jsonl"),
        "list": str(tmp_path / "c.jsonl.dropped.jsonl"),
        "rows": 6,
        "written": 3,
        "dropped": 3,
    }


def test_rows_stand_as_they_stood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question": "q \ud800 \u4f60", "best": "b", "worst": "w", "meta": {"n": [1, 2.5, None]}, "at": "2024-05-01"}
    file = write(tmp_path / "odd.jsonl", [row])
    mapping = ("--columns", "prompt=question", "chosen=best", "rejected=worst")
    check(capsys, file, *mapping, "--write", tmp_path / "clean.jsonl")
    assert lines_of(tmp_path / "clean.jsonl") == [row]


def test_all_columns_of_a_table_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"], "note": ["n"], "source": ["s"]})
    pq.write_table(table, tmp_path / "t.parquet")
    curation = found(capsys, tmp_path / "t.parquet", "--write", tmp_path / "clean.jsonl")
    assert curation["origins"] == {"source": {"s": 1}}
    assert lines_of(tmp_path / "clean.jsonl") == table.to_pylist()


def test_what_json_cannot_hold_is_an_error_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(
        pa.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"], "raw": [b"x"]}), tmp_path / "t.parquet"
    )
    err = mistake(capsys, tmp_path / "t.parquet", "--write", tmp_path / "clean.jsonl")
    assert "A row cannot be written as JSON." in err and "bytes" in err
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_nothing_left_leaves_what_was_there(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "leak.jsonl", [ROWS[2]])
    clean = tmp_path / "clean.jsonl"
    clean.write_text("before")
    assert "No row would be left." in mistake(capsys, file, "--against", bench, "--write", clean)
    assert clean.read_text() == "before"
    assert not (tmp_path / "clean.jsonl.dropped.jsonl").exists()


def test_if_the_list_cannot_be_written_neither_is_the_file(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clean.jsonl.dropped.jsonl").mkdir()
    assert "The output cannot be written here." in mistake(capsys, pairs, "--write", tmp_path / "clean.jsonl")
    assert not (tmp_path / "clean.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--write", "clean.csv"], "write has to end in .jsonl"),
        (["--report", "page.txt"], "report has to end in .html"),
        (["--write", "pairs.jsonl"], "write would change pairs.jsonl, which is read"),
        (["--against", "bench.jsonl", "--write", "bench.jsonl"], "write would change bench.jsonl, which is read"),
    ],
)
def test_outputs_that_cannot_be(
    arguments: list[str],
    said: str,
    pairs: Path,
    bench: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(pairs.parent)
    before = pairs.read_bytes(), bench.read_bytes()
    assert said in mistake(capsys, "pairs.jsonl", *arguments)
    assert (pairs.read_bytes(), bench.read_bytes()) == before


def test_a_file_named_twice_is_an_error(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "The same rows are read twice." in mistake(capsys, pairs, pairs)


# --- other kinds of rows ---------------------------------------------------------------------------


def test_prompts_alone(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": p} for p in (BENCH, LONG, LONG + " Yes.", "Say it.", "Say it.", " ")]
    file = write(tmp_path / "prompts.jsonl", rows)
    curation = found(capsys, file, "--prompts", "--against", bench, "--write", tmp_path / "clean.jsonl")
    assert curation["rows"] == 4 and curation["lengths"] is None
    assert [n["row"] for n in curation["near_duplicates"]["found"]] == [3]
    assert lines_of(tmp_path / "clean.jsonl") == [rows[1], rows[3]]
    reasons = [line["reason"] for line in lines_of(tmp_path / "clean.jsonl.dropped.jsonl")]
    assert reasons == ["leak", "near_duplicate", "prompt_repeated", "empty_prompt"]


def test_rankings_ratings_and_demonstrations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "Count.", "completions": ["one two three", "one two", "one"]},
        {"prompt": LONG, "completion": OTHER, "label": True},
        {"prompt": LONG, "completion": OTHER + " So.", "label": False},
        {"prompt": "Go.", "completion": "As an AI language model, I cannot go."},
    ]
    curation = found(capsys, write(tmp_path / "mixed.jsonl", rows))
    # Gaps of the ranking's three pairs: 1, 2, 1.
    assert curation["lengths"]["pairs"] == 3 and curation["lengths"]["gap"]["value"] == pytest.approx(4 / 3)
    assert [n["row"] for n in curation["near_contradictions"]["found"]] == [3]
    assert curation["near_duplicates"]["rows"] == 0
    assert curation["refusals"]["completion"]["rows"] == 1


def test_with_a_model_lengths_are_in_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    rows = [{"prompt": "p", "chosen": "abc", "rejected": "a"}, {"prompt": "q" * 90, "chosen": "b", "rejected": "c"}]
    file = write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "r", "chosen": "abcd", "rejected": "abcd"}])
    lengths = found(capsys, file, "--model", tmp_path / "model", "--max-length", "32")["lengths"]
    # A letter a token, and the end: 4 and 2 in the first row, 2 and 2 in the second, whose prompt was cut.
    assert (lengths["unit"], lengths["pairs"], lengths["better"], lengths["worse"]) == ("tokens", 2, 3, 2)


# --- the page --------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name in ("src", "href") and value != "data:," for name, value in attrs), attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"source": "<script>alert(1)</script>"} if n == 3 else row for n, row in enumerate(ROWS)]
    file = write(tmp_path / "pairs.jsonl", rows)
    check(capsys, file, "--against", bench, "--report", tmp_path / "page.html")
    page = _Page((tmp_path / "page.html").read_text())
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("figure") == page.tags.count("svg") == 3  # length gap, score_chosen, source
    for said in ("4 of 6 rows are usable", "<script>alert(1)</script>", "Every leak", f"{file}:2", "Length gap"):
        assert said in page.text
    before = (tmp_path / "page.html").read_bytes()
    check(capsys, file, "--against", bench, "--report", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == before
