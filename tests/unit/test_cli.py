"""The command line: help, exit codes and messages, by the program itself or its `main`."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from prefopt.cli import main
from prefopt.config import BestOfConfig, DPOConfig, QuickstartConfig, RewardConfig, SFTConfig
from prefopt.errors import DataError
from prefopt.failure import exit_code
from prefopt.flags import with_flags_of
from prefopt.parse import flag_of
from prefopt.run import RunFolder

COMMANDS = ["quickstart", "check", "sft", "dpo", "reward", "ppo", "resume", "score", "evaluate", "chat", "merge"]
COMMANDS += ["evaluate best-of", "evaluate frontier"]
GOLDEN = Path(__file__).parents[1] / "golden"
ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def prefopt(
    *arguments: str, stdout: int = subprocess.PIPE, unbuffered: bool = False
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, as a shell starts it."""
    command = [sys.executable, *(["-u"] if unbuffered else []), "-m", "prefopt", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def help_text(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    patch.setenv("COLUMNS", "100")
    patch.setenv("NO_COLOR", "1")
    code, out, err = run(capsys, *arguments, "--help")
    assert (code, err) == (0, "")
    return "".join(f"{line.rstrip()}\n" for line in out.splitlines())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_as_agreed(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """PREFOPT_GOLDEN=1 writes the files anew; read the difference before you keep it."""
    text = help_text(command.split(), capsys, monkeypatch)
    file = GOLDEN / f"help-{command.replace(' ', '-') or 'prefopt'}.txt"
    if os.environ.get("PREFOPT_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_every_golden_file_belongs_to_a_command() -> None:
    named = {f"help-{c.replace(' ', '-')}.txt" for c in ["prefopt", *COMMANDS]}
    assert {p.name for p in GOLDEN.glob("help-*.txt")} == named


@pytest.mark.parametrize(
    ("command", "kind"),
    [("sft", SFTConfig), ("dpo", DPOConfig), ("reward", RewardConfig), ("evaluate best-of", BestOfConfig)],
)
def test_help_has_every_setting_with_its_default_and_examples(
    command: str, kind: type[BaseModel], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(command.split(), capsys, monkeypatch)
    entries = {
        match[1]: " ".join(match[0].split()) for match in re.finditer(r"(?ms)^ (--[a-z-]+).*?(?=^ --|^\n)", text)
    }
    for name, field in kind.model_fields.items():
        entry = entries[flag_of(name)]
        if field.is_required():
            assert entry.endswith("[required]")
        elif field.default is not None and not isinstance(field.default, float):
            assert entry.endswith(f"[default: {str(field.default).lower()}]")
    assert 1 <= text.count(f"\n  prefopt {command} ") <= 3


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "matplotlib", "pyarrow", "peft", "numpy", "scipy", "jinja2")
    program = (
        "import sys\nfrom prefopt.cli import main\n"
        f"for command in {COMMANDS!r}:\n    assert main([*command.split(), '--help']) == 0\n"
        "main(['--help']), main(['dpo', '--model', 'm'])\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stderr


def test_version_is_that_of_the_package() -> None:
    assert prefopt("--version").stdout == "0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["chek", "x"], "There is no command 'chek'.", "Did you mean `prefopt check`?"),
        (["evaluate", "best"], "There is no command 'best'.", "Did you mean `prefopt evaluate best-of`?"),
        (["evaluate", "quickstart"], "There is no command 'quickstart'.", "`prefopt evaluate --help`"),
        (["evaluat"], "There is no command 'evaluat'.", "Did you mean `prefopt evaluate`?"),
        (["evaluate", "best-of", "--sample", "3"], "There is no flag --sample here.", "Did you mean --samples?"),
        (["evaluate", "best-of", "stray"], "prefopt evaluate best-of does not know what to do with this.", "stray"),
        (["dpo", "--batch-pair", "3"], "There is no flag --batch-pair here.", "Did you mean --batch-pairs?"),
        (["dpo", "--batch-pair=3"], "There is no flag --batch-pair here.", "Did you mean --batch-pairs?"),
        (["sft", "--beta", "1"], "There is no flag --beta here.", "`prefopt sft --help`"),
        (["dpo", "--lr"], "--lr needs a value.", "`prefopt dpo --help`"),
        (["dpo", "--data"], "--data needs a value.", "`prefopt dpo --help`"),
        (["sft", "--columns", "--lr", "1"], "--columns needs a value.", "`prefopt sft --help`"),
        (["dpo", "--lr", "1", "--lr", "2"], "--lr is given twice.", "every flag once"),
        (["dpo", "stray"], "prefopt dpo does not know what to do with this.", "stray"),
        (["sft", "--compile-blocks=maybe"], "--compile-blocks is a switch.", "maybe"),
        (["check"], "FILE is missing.", "Data files"),
        (["resume"], "RUN is missing.", "`prefopt resume --help`"),
        (["merge", "a"], "A setting is missing: out.", "Give --out."),
        (["dpo", "--model", "m", "--data", "d", "--out", "o"], "A setting is missing: beta.", "--beta"),
        (["check", "f", "--columns", "prompt"], "--columns cannot be read.", "prompt=question"),
        (["check", "f", "--columns", "prompt=a", "prompt=b"], "--columns names prompt twice.", "prompt=b"),
        (["chat", "m", "--temperature", "-1"], "temperature is not right.", "flag --temperature"),
        (["chat", "m", "--max-new-tokens", "1.5"], "max_new_tokens is not right.", "a whole number"),
    ],
)
def test_mistakes_get_one_message(
    arguments: list[str], what: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"error: {what}"
    assert hint in err
    assert not re.search("[─-╿]|Traceback", err)  # no box art


def test_with_json_the_message_is_on_stdout_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "dpo", "--lr", "fast", "--model", "m", "--data", "d", "--out", "o", "--beta", "1", "--json"
    )
    assert code == 2
    error = json.loads(out)["error"]
    assert (error["what"], error["where"], error["got"]) == ("lr is not right.", "flag --lr", "fast")
    assert err.startswith("error: lr is not right.\n")
    assert json.loads(run(capsys, "dpo", "--nonsense", "--json")[1])["error"]["where"] == "prefopt dpo"


def test_flags_reach_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d.jsonl\nout: o\nbeta: 0.5\ncompile_blocks: true\n")
    seen: list[DPOConfig] = []
    command = with_flags_of(DPOConfig, file=True)(lambda config, as_json: seen.append(config))
    from cyclopts import App

    app = App(result_action="return_value")
    app.default(command)
    app(
        [
            "--config",
            str(file),
            "--data",
            "a",
            "b",
            "--batch-pairs",
            "8",
            "--lr=1e-5",
            "--columns",
            "prompt=q",
            "chosen=x y",
        ]
        + ["--no-compile-blocks", "--data", "c"],
        exit_on_error=False,
    )
    (config,) = seen
    assert config.data == ("a", "b", "c")
    assert config.columns == {"prompt": "q", "chosen": "x y"}
    assert (config.beta, config.batch_pairs, config.lr, config.compile_blocks) == (0.5, 8, 1e-5, False)


def test_check_prints_a_table_and_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(ROW + ROW.replace('"c"', '"b"'))
    code, out, _ = run(capsys, "check", str(file))
    assert code == 0
    assert out.startswith("read as preference pairs of text (prompt, chosen, rejected)")
    table, _, findings = out.partition("\n\nFound in 1 usable rows")
    assert table.splitlines()[-1] == (
        "1 of 2 rows are usable. Training stops when more than 20% are refused, unless --max-refused is raised."
    )
    assert "near duplicates" in findings
    code, out, _ = run(capsys, "check", str(file), "--json")
    found = json.loads(out)
    assert list(found) == ["rows", "kept", "mended", "refused", "reasons", "format", "curation"]
    assert (code, found["rows"], found["kept"], found["refused"]) == (0, 2, 1, 1)


def test_check_with_nothing_usable_leaves_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(ROW.replace('"c"', '"b"'))
    with pytest.raises(SystemExit) as left:
        main(["check", str(file)])
    assert left.value.code == 2
    assert capsys.readouterr().out.splitlines()[-1] == "No row is usable."


def test_the_program_leaves_without_a_traceback(tmp_path: Path) -> None:
    done = prefopt("dpo", "--config", str(tmp_path / "none.yaml"), "--json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: The configuration file cannot be read.")
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["where"] == str(tmp_path / "none.yaml")


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_leaves_is_no_error(unbuffered: bool) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = prefopt("merge", "--json", stdout=write, unbuffered=unbuffered)
    finally:
        os.close(write)
    assert done.returncode == 141
    assert done.stderr.startswith("error: ADAPTER is missing.")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body(config: QuickstartConfig, as_json: bool) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    command = with_flags_of(QuickstartConfig)(body)
    assert exit_code(lambda: command(out=str(tmp_path / "story")), [], {}) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: The disk is full.\n  where:    {tmp_path / 'story'}\n")
    assert "MB free" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_standard_output_is_named(unbuffered: bool) -> None:
    with open("/dev/full", "w") as full:
        done = prefopt("--version", stdout=full.fileno(), unbuffered=unbuffered)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: The results cannot be written.\n  where:    standard output\n  got:      no space left there\n"
    )


@pytest.mark.parametrize("words", ["I/O error: No space left on device (os error 28)", "database or disk is full"])
def test_a_full_disk_in_a_librarys_words(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body(config: QuickstartConfig, as_json: bool) -> None:
        raise RuntimeError(words)

    command = with_flags_of(QuickstartConfig)(body)
    assert exit_code(lambda: command(out=str(tmp_path)), [], {}) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_forbidden_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert exit_code(lambda: (tmp_path / "file" / "run").mkdir(), [], {}) == 2
    assert f"where:    {tmp_path / 'file' / 'run'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("events", "told"),
    [
        (None, "interrupted"),  # no run there
        (["started"], "interrupted before the first step; go on with: prefopt resume {run}"),
        (["started", "rows"], "interrupted; go on with: prefopt resume {run}"),
        (["started", "rows", "finished"], "interrupted"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    events: list[str] | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(config: QuickstartConfig, as_json: bool) -> None:
        if events is not None:
            made = RunFolder.create(config.out, recipe="dpo", config=config, manifest={})
            for event in events:
                made.event(event, step=0)
        raise KeyboardInterrupt

    command = with_flags_of(QuickstartConfig)(body)
    assert exit_code(lambda: command(out=str(tmp_path / "run")), [], {}) == 130
    assert capsys.readouterr().err == told.format(run=tmp_path / "run") + "\n"


def test_bugs_keep_their_traceback_and_other_endings_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    def ends(error: BaseException) -> int:
        def body() -> None:
            raise error

        return exit_code(body, ["--json"], {})

    assert ends(KeyboardInterrupt()) == 130
    assert ends(DataError("No row.", where="f")) == 2
    for bug in (ZeroDivisionError("x"), OSError(errno.EIO, "broken", "f"), RuntimeError("x")):
        with pytest.raises(type(bug)):
            ends(bug)
    with pytest.raises(SystemExit) as left:
        ends(SystemExit(143))
    assert left.value.code == 143
