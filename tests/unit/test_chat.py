"""Talking to a model: piped lines, commands, a conversation that grows too long, and Ctrl-C."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from prefopt.errors import ConfigError, DataError
from prefopt.serve.chat import _Collected, chat
from tiny import save_tiny_model

_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path / "tiny")
    return path / "tiny"


@pytest.fixture(scope="module")
def chatty(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chatty") / "model"
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def talk(
    folder: Path,
    lines: str | io.TextIOBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    **options: object,
) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines) if isinstance(lines, str) else lines)
    settings = {"system": None, "temperature": 0.0, "max_new_tokens": 3, "seed": 0, "template": "auto"} | options
    chat(str(folder), **settings)  # type: ignore[arg-type]
    said = capsys.readouterr()
    return said.out, said.err


def test_a_base_model_continues_each_line_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, _ = talk(folder, "Who\n", monkeypatch, capsys)
    both, said = talk(folder, "How is\nWho\n\n/quit\nnever read\n", monkeypatch, capsys)
    assert len(alone) == 4 and alone.endswith("\n")  # three letters and the line's end
    assert len(both) == 8 and both.endswith(alone)
    assert ">" not in said


def test_a_conversation_keeps_its_history_until_reset(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = talk(chatty, "Who\n", monkeypatch, capsys)
    again, _ = talk(chatty, "What\n/reset\nWho\n", monkeypatch, capsys)
    assert again.endswith(first)
    long = "".join(f"line {letter}\n" for letter in "abcdefghij")
    _, said = talk(chatty, long, monkeypatch, capsys)
    assert "oldest turns are forgotten" in said
    _, said = talk(chatty, "x" * 200 + "\n", monkeypatch, capsys)
    assert "only its last" in said


def test_a_system_message_needs_a_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="system message"):
        talk(folder, "Who\n", monkeypatch, capsys, system="Be brief.")
    out, _ = talk(folder, "Who\n", monkeypatch, capsys, system="Be brief.", template="plain")
    assert out.strip("\n")


def test_input_that_is_not_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="not text"):
        talk(folder, io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"), monkeypatch, capsys)


def test_an_answer_ends_where_the_next_turn_begins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = _Collected(AutoTokenizer.from_pretrained(folder), "\n\nHuman:")
    shown = []
    for piece in ("It is", "\n", "so.\n", "\nHu", "man: And", " then?"):
        stream.on_finalized_text(piece)
        shown.append(capsys.readouterr().out)
    assert shown == ["It is", "", "\nso.", "", "", ""]
    assert stream.text == "It is\nso."
    assert bool(stream(torch.zeros(1, 2, dtype=torch.long), None).all())
    whole = _Collected(AutoTokenizer.from_pretrained(folder), "\n\nHuman:")
    whole.on_finalized_text("It is\n")
    whole.on_finalized_text("\n", stream_end=True)
    assert capsys.readouterr().out == "It is\n\n\n" and whole.text == "It is\n\n"
    assert not bool(whole(torch.zeros(1, 2, dtype=torch.long), None).any())


def _read_until(terminal: int, wanted: str, limit: float = 120) -> str:
    text, end = "", time.monotonic() + limit
    while wanted not in text:
        assert time.monotonic() < end, f"no {wanted!r} in {text!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
    return text


def test_ctrl_c_stops_an_answer_then_leaves(folder: Path) -> None:
    endless = "\n".join(
        [
            "from prefopt.failure import exit_code",
            "from prefopt.serve import chat as room",
            "room.max_positions = lambda config: None",  # an answer without end
            "import sys; sys.exit(exit_code(lambda: room.chat(sys.argv[1], system=None, temperature=1.0,",
            "    max_new_tokens=10**6, seed=0, template='auto'), [], {}))",
        ]
    )
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", endless, str(folder)], stdin=inside, stdout=inside, stderr=inside, close_fds=True
    )
    os.close(inside)
    try:
        _read_until(terminal, "> ")
        os.write(terminal, b"How is x\n")
        _read_until(terminal, "How is x\r\n")
        assert select.select([terminal], [], [], 60)[0]  # it has begun to write
        process.send_signal(signal.SIGINT)
        _read_until(terminal, "(stopped)")
        os.write(terminal, b"/help\n")
        assert "/reset" in _read_until(terminal, "stops an answer")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
