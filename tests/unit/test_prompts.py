"""Prompts from rows of every layout: each once, none cut, and what is not used is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.data.audit import Audit
from prefopt.data.prompts import Prompt, prompt_groups
from prefopt.data.read import read_prompts
from prefopt.data.tokenize import Renderer
from prefopt.errors import ConfigError, DataError
from prefopt.records import Content, Message
from tiny import letters_tokenizer, save_tiny_model

HI = Message("user", "Hi")
HELLO = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Who?"))


def read(folder: Path, *rows: Any, **options: Any) -> tuple[list[Prompt], Audit]:
    file, audit = folder / "rows.jsonl", Audit()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts([str(file)], audit=audit, **options), audit


def turns(*messages: Message) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Once"}, "Once"),
        ({"prompt": "Once", "completion": " upon"}, "Once"),
        ({"prompt": "Once", "completions": ["a", "b"]}, "Once"),
        ({"prompt": "Once", "chosen": "a", "rejected": "b"}, "Once"),
        ({"prompt": turns(*HELLO)}, HELLO),
        ({"messages": turns(*HELLO)}, HELLO),
        ({"messages": turns(*HELLO, Message("assistant", "Me."))}, HELLO),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, (HI,)),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, (Message("user", "Add\n1 2"),)),
        (
            {"chosen": turns(HI, Message("assistant", "a")), "rejected": turns(HI, Message("assistant", "b"))},
            (HI,),
        ),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, (HI,)),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, (HI,)),
        ({"system": "Be kind.", "prompt": "Hi"}, (Message("system", "Be kind."), HI)),
        ({"system": "Be kind.", "messages": turns(*HELLO)}, (Message("system", "Be kind."), *HELLO)),
        (
            {"system": "Be kind.", "messages": turns(Message("system", "Be kind."), HI)},
            (Message("system", "Be kind."), HI),
        ),
    ],
)
def test_every_layout_has_its_prompt(row: dict[str, Any], expected: Content, tmp_path: Path) -> None:
    found, audit = read(tmp_path, row)
    assert [prompt.content for prompt in found] == [expected]
    assert audit.refused == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": " \n"}, "empty_prompt"),
        ({"text": "Once upon a time"}, "missing_columns"),
        ({"messages": turns(Message("assistant", "a"))}, "no_user_turn"),
        ({"prompt": 3}, "wrong_type"),
        ([1, 2], "missing_columns"),
    ],
)
def test_a_row_without_a_prompt_is_refused_and_named(row: Any, reason: str, tmp_path: Path) -> None:
    found, audit = read(tmp_path, {"prompt": "Once"}, row)
    assert [prompt.content for prompt in found] == ["Once"]
    assert audit.reasons == {reason: 1}
    assert str(audit.findings[0].source).endswith("rows.jsonl:2")


def test_a_prompt_stands_once_whatever_layout_it_comes_in(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}, {"messages": turns(HI, Message("assistant", "x"))}]
    found, audit = read(tmp_path, *rows, {"prompt": "Hi"}, {"prompt": "Hi"})
    assert [prompt.content for prompt in found] == [(HI,), "Hi"]  # a turn and a text are different prompts
    assert [prompt.source.row for prompt in found] == [1, 3]
    assert audit.reasons == {"prompt_repeated": 2}


def test_mapped_columns_and_replaced_characters(tmp_path: Path) -> None:
    found, audit = read(tmp_path, {"question": "a\0b"}, columns={"prompt": "question"})
    assert found[0].content == "a\ufffdb"
    assert audit.reasons == {"nul_characters": 1}
    with pytest.raises(DataError, match="prompt=absent"):
        read(tmp_path, {"question": "a"}, columns={"prompt": "absent"})


def test_sources_are_checked_as_for_other_rows(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no row in the data"):
        read_prompts([str(tmp_path / "blank.jsonl")], audit=Audit())
    with pytest.raises(ConfigError, match="split does nothing here"):
        read(tmp_path, {"prompt": "a"}, split="train")


def test_a_prompt_that_leaves_no_room_is_refused_not_cut(tmp_path: Path) -> None:
    found, audit = read(tmp_path, {"prompt": "abcd"}, {"prompt": "abcde"})
    renderer = Renderer(letters_tokenizer(), eos_ids=frozenset({1}))
    groups = list(prompt_groups(found, renderer, longest=4, audit=audit))
    assert [group.source.row for group in groups] == [1] and groups[0].completions == ()
    assert len(groups[0].prompt_ids) == 4
    (finding,) = audit.findings
    assert (finding.source.row, finding.detail) == (2, "5 tokens, and there is room for 4")


def test_the_data_doctor_looks_at_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "one two"}, {"prompt": ""}, {"prompt": "one two"}, {"text": "no prompt"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["check", str(file), "--prompts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["kept"], found["mended"], found["refused"]) == (4, 1, 1, 2)
    assert found["reasons"] == {"prompt_repeated": 1, "empty_prompt": 1, "missing_columns": 1}
    file.write_text(json.dumps(rows[0]) + "\n")
    save_tiny_model(tmp_path / "model")
    asked = ["--prompts", "--model", str(tmp_path / "model"), "--max-prompt-length", "3", "--json"]
    with pytest.raises(SystemExit):  # seven letters are seven tokens: no row is usable
        main(["check", str(file), *asked])
    assert json.loads(capsys.readouterr().out)["reasons"]["prompt_too_long"] == 1
