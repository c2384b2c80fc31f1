"""Run folders: made whole or not at all, never over another, and readable after a kill at any byte."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from prefopt.errors import NonFiniteError, RunError
from prefopt.run import RunFolder, check_manifest, file_sha256, write_atomically


class Settings(BaseModel):
    """A recipe's configuration, with what YAML may trip over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path
    data: tuple[str, ...] = ("pairs.jsonl",)
    lr: float = 1e-6
    max_steps: int | None = None
    columns: dict[str, str] | None = None
    shuffle: bool = True


def config(out: Path, **more: Any) -> Settings:
    return Settings(out=out, **more)


def make(path: Path) -> RunFolder:
    return RunFolder.create(path, recipe="dpo", config=config(path), manifest={"model": "sha256:1"})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_created_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    settings = config(path, lr=3.3e-07, data=("1e3", "~", "é\udcff"), columns={"no": "2026-01-01", "on": "a: b\n"})
    RunFolder.create(path, recipe="dpo", config=settings, manifest={"model": "sha256:1", "data": {"a": "sha256:2"}})
    run = RunFolder.open(path)
    assert run.recipe == "dpo"
    assert run.manifest["data"] == {"a": "sha256:2"}
    assert Settings.model_validate(run.config_dict) == settings
    assert (run.checkpoints, run.model) == (path / "checkpoints", path / "model")
    assert not run.finished
    assert os.listdir(tmp_path / "deep") == ["run"]


def test_an_empty_folder_may_be_filled_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "manifest.json").is_file()


def test_another_run_is_never_written_over(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="prefopt resume") as caught:
        make(tmp_path / "run")
    assert "config.yaml, manifest.json" in str(caught.value)
    assert snapshot(tmp_path) == before

    run.event("finished", step=3)
    assert run.finished
    with pytest.raises(RunError, match="another --out") as caught:
        RunFolder.refuse_taken(tmp_path / "run")
    assert "resume" not in str(caught.value)


def test_anything_else_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = snapshot(tmp_path)
    for name, found in {"file": "a file", "nowhere": "a link to nothing", "full": "thesis.txt"}.items():
        with pytest.raises(RunError, match=f"got: +{found}"):
            make(tmp_path / name)
    assert snapshot(tmp_path) == before


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunFolder.create(tmp_path / "run", recipe="dpo", config=config(tmp_path), manifest={"model": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_or_damaged_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(RunError, match="no run folder"):
            RunFolder.open(path)
    for name, content in {
        "config.yaml": ["beta: [0.1", "just text", "", "\x00"],
        "manifest.json": ['{"recipe": "dp', "[]", "{}", '{"recipe": 3}'],
    }.items():
        for number, text in enumerate(content):
            run = make(tmp_path / f"{name}{number}")
            (run.path / name).write_text(text)
            with pytest.raises(RunError, match="damaged") as caught:
                RunFolder.open(run.path)
            assert str(run.path / name) in str(caught.value)


def test_metrics_are_kept_exactly(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    values = {"loss": 0.1 + 0.2, "lr": 5e-324, "kl": 1 / 3, "peak_memory_bytes": 2**53 + 1}
    run.log_metrics(0, "eval", values)
    run.log_metrics(0, "train", {"loss": 1.0})
    assert run.metrics() == [{"step": 0, "split": "eval", **values}, {"step": 0, "split": "train", "loss": 1.0}]
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_named_and_not_written(tmp_path: Path, bad: float) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(NonFiniteError, match=rf"(?s)eval metrics at step 7.*kl = {bad}"):
        run.log_metrics(7, "eval", {"loss": 1.0, "kl": bad})
    assert run.metrics() == []


def test_events_hold_any_text(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    rows = ["a\u2028b\x85c.jsonl:1", "undecodable \udcff.jsonl:2", "line\nbreak"]
    run.event("rows", step=4, rows=rows)
    (event,) = run.events()
    assert (event["step"], event["event"], event["rows"]) == (4, "rows", rows)
    assert event["time"].endswith("+00:00")


def test_a_line_cut_at_any_byte_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    run.log_metrics(0, "train", {"loss": 0.5})
    first = (run.path / "metrics.jsonl").read_bytes()
    run.log_metrics(1, "train", {"loss": 0.25})
    whole = (run.path / "metrics.jsonl").read_bytes()
    for end in range(len(first) + 1, len(whole)):
        (run.path / "metrics.jsonl").write_bytes(whole[:end])
        assert [m["step"] for m in run.metrics()] == [0]
        capsys.readouterr()
        run.log_metrics(2, "train", {"loss": 0.125})
        assert [m["step"] for m in run.metrics()] == [0, 2]
        assert "cut short" in capsys.readouterr().err
    (run.path / "metrics.jsonl").write_bytes(whole[:-9])
    run.rewind(5)
    assert "cut short" in capsys.readouterr().err
    assert (run.path / "metrics.jsonl").read_bytes() == first


def test_a_very_long_torn_line_is_cut_at_its_beginning(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.event("rows", step=0, rows=["x" * 10_000])
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(b"y" * 9_000)
    run.event("rows", step=1, rows=[])
    assert [e["step"] for e in run.events()] == [0, 1]


@pytest.mark.parametrize("line", ["{oops}", "[1]", '{"loss": 1.0}', "", "\x00\x00"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    run = make(tmp_path / "run")
    run.log_metrics(0, "train", {"loss": 0.5})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    run.log_metrics(1, "train", {"loss": 0.5})
    with pytest.raises(RunError, match=r"metrics\.jsonl:2"):
        run.metrics()


def test_rewinding_forgets_the_lost_steps_and_keeps_the_history(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.event("started", step=0)
    run.event("path", step=0)
    for step in range(4):
        if step == 2:
            run.event("saved", step=2)
        if step % 2 == 0:
            run.log_metrics(step, "eval", {"loss": 2.0})
        run.event("rows", step=step, rows=[f"f:{step}"])
        run.log_metrics(step, "train", {"loss": 1.0})
        run.event("warned", step=step, kind="k")
    run.event("saved", step=4)
    run.event("interrupted", step=4)

    run.rewind(2)
    # a checkpoint at step 2 comes before anything else at 2: that step is done again, whole
    assert [(m["step"], m["split"]) for m in run.metrics()] == [(0, "eval"), (0, "train"), (1, "train")]
    told = [(0, "started"), (0, "path"), (0, "rows"), (0, "warned"), (1, "rows"), (1, "warned")]
    history = [(2, "saved"), (4, "saved"), (4, "interrupted")]
    assert [(e["step"], e["event"]) for e in run.events()] == told + history

    before = snapshot(run.path)
    run.rewind(2)
    assert snapshot(run.path) == before
    run.rewind(0)
    assert run.metrics() == []
    assert [e["event"] for e in run.events()] == ["started", "path", "saved", "saved", "interrupted"]


MANIFEST = {
    "model": "m",
    "reference": "r",
    "tokenizer": "t",
    "template": "c",
    "data": {"a.jsonl": "1", "b.jsonl": "2"},
    "versions": {"torch": "2.13"},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "x"}, "model weights"),
        ({"reference": None}, "reference model weights"),
        ({"tokenizer": "x"}, "tokenizer"),
        ({"template": "x"}, "chat template"),
        ({"data": {"a.jsonl": "1", "b.jsonl": "x"}}, "data file b.jsonl"),
        ({"data": {"a.jsonl": "1"}}, "data file b.jsonl"),
        ({"data": {"a.jsonl": "x", "b.jsonl": "2", "c.jsonl": "3"}}, "data file a.jsonl, data file c.jsonl"),
        ({"model": "x", "template": "x"}, "model weights, chat template"),
    ],
)
def test_exactly_what_changed_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RunError) as caught:
        check_manifest(MANIFEST, {**MANIFEST, **change})
    assert caught.value.where == named


def test_the_same_ingredients_may_go_on_with_other_versions() -> None:
    old = {"recipe": "dpo", "created": "2026-01-01", **MANIFEST}
    check_manifest(old, {**MANIFEST, "versions": {"torch": "2.14"}})


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.jsonl"
    write_atomically(target, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                write_atomically(target, b"new")
        assert snapshot(tmp_path) == {"out.jsonl": b"old"}
    write_atomically(target, b"new")
    assert snapshot(tmp_path) == {"out.jsonl": b"new"}


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_bytes(b"old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_atomically(tmp_path / "link.txt", b"new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    for path, found in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe")):
        with pytest.raises(RunError, match=found):
            write_atomically(path, b"new")
    assert sorted(os.listdir(tmp_path)) == ["link.txt", "pipe", "real.txt"]


def test_files_have_the_modes_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = make(tmp_path / "run")
    finally:
        os.umask(before)
    assert run.path.stat().st_mode & 0o777 == 0o750
    assert (run.path / "config.yaml").stat().st_mode & 0o777 == 0o640


def test_a_run_is_locked_against_other_processes_until_its_owner_ends(tmp_path: Path) -> None:
    make(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from prefopt.run import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1])); run.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(RunError, match="Another process") as caught:
            RunFolder.open(tmp_path / "run").lock()
        assert caught.value.where == str(tmp_path / "run")
        other.kill()
        other.wait()
    run = RunFolder.open(tmp_path / "run")
    run.lock()
    run.lock()  # one's own lock is no obstacle
    assert not run.finished


def test_a_file_is_written_whole_from_pieces(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise ValueError

    write_atomically(tmp_path / "f", (b"a", b"b"))
    assert (tmp_path / "f").read_bytes() == b"ab"
    with pytest.raises(ValueError):
        write_atomically(tmp_path / "f", pieces())
    assert (tmp_path / "f").read_bytes() == b"ab" and os.listdir(tmp_path) == ["f"]
