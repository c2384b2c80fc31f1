"""Talking to a model: piped lines, commands, a conversation that grows too long, and Ctrl-C."""

import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from prefopt.data.tokenize import Renderer
from prefopt.errors import ConfigError, DataError
from prefopt.records import Message
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


@pytest.fixture(scope="module")
def endless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has no token to end with, and room for more than anybody waits for."""
    path = tmp_path_factory.mktemp("endless") / "model"
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 10**7
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
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


def test_ctrl_c_before_the_first_token_stops_that_answer_only(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    prompt_ids = Renderer.prompt_ids

    def interrupted_once(self: Renderer, turns: tuple[Message, ...]) -> object:
        asked.append([turn.role for turn in turns])
        if len(asked) == 1:
            signal.raise_signal(signal.SIGINT)
        return prompt_ids(self, turns)

    monkeypatch.setattr(Renderer, "prompt_ids", interrupted_once)
    try:
        out, said = talk(chatty, "What\nWho\n", monkeypatch, capsys)
    except KeyboardInterrupt:  # which would end the tests
        pytest.fail("it left the conversation")
    assert said.count("(stopped)") == 1
    assert out.startswith("\n") and len(out) == 5  # nothing, then three letters: an end of line after each
    assert asked == [["user"], ["user", "assistant", "user"]]


def _read_until(terminal: int, wanted: str) -> str:
    """What the terminal shows up to `wanted`, however long that takes; fails if the other side leaves before."""
    text = ""
    while wanted not in text:
        try:
            text += os.read(terminal, 4096).decode(errors="replace")
        except OSError:
            pytest.fail(f"it left without {wanted!r}: {text!r}")
    return text


def test_ctrl_c_stops_an_answer_then_leaves(endless: Path) -> None:
    terminal, inside = pty.openpty()
    arguments = ("chat", str(endless), "--max-new-tokens", "1000000", "--temperature", "1", "--seed", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt", *arguments], stdin=inside, stdout=inside, stderr=inside, close_fds=True
    )
    os.close(inside)
    try:
        _read_until(terminal, "> ")
        os.write(terminal, b"How is x\n")
        _read_until(terminal, "How is x\r\n")
        assert os.read(terminal, 1)  # the answer has begun, and has no end
        process.send_signal(signal.SIGINT)
        _read_until(terminal, "(stopped)\r\n> ")
        os.write(terminal, b"/help\n")
        assert "/reset" in _read_until(terminal, "stops an answer\r\n> ")
        process.send_signal(signal.SIGINT)
        _read_until(terminal, "interrupted")
        assert process.wait() == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
