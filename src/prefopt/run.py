"""A run folder: resolved configuration, manifest, metrics and events, written so that a kill costs nothing."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from prefopt.atomic import allowed, sync_folder, write_together
from prefopt.errors import NonFiniteError, RunError
from prefopt.progress import warn

__all__ = [
    "RunFolder",
    "append_line",
    "check_manifest",
    "file_sha256",
    "read_lines",
    "sync_folder",
    "unfinished",
    "write_atomically",
]

# Events of the run as a whole; all others belong to a step and are told again when it is done again.
_HISTORY = frozenset({"started", "path", "budget", "saved", "interrupted", "resumed", "reward"})


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """`path` holds all of `content`, given whole or in pieces, or what it held before, whatever happens.

    A link is followed: what it points to is written.

    Raises:
        RunError: `path` is a folder or a device, which cannot be replaced whole.
    """
    write_together({path: content})


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. `create` makes it, `open` finds it again."""

    path: Path

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Raise RunError if anything stands at `path`; cheap, so recipes ask before they load a model."""
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return
        if unfinished(path):
            todo = f"Go on with it by `prefopt resume {path}`, or choose another --out."
        else:
            todo = "Choose another --out; nothing is ever written over."
        raise RunError(
            "The output folder is not empty." if path.is_dir() else "The output folder cannot be made.",
            where=str(path),
            got=_contents(path),
            expected="an empty folder, or a name that is free",
            todo=todo,
        )

    @classmethod
    def create(cls, path: Path, *, recipe: str, config: BaseModel, manifest: Mapping[str, Any]) -> "RunFolder":
        """A new run folder, whole or not at all.

        Raises:
            RunError: something stands at `path` already.
        """
        cls.refuse_taken(path)
        target = path.resolve()  # of a link to an empty folder, the folder is filled
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            draft.chmod(allowed(0o777))
            write_atomically(draft / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False).encode())
            # Names in the configuration may be relative: to this folder.
            facts = {"recipe": recipe, "created": _now(), "folder": str(Path.cwd()), **manifest}
            write_atomically(draft / "manifest.json", (json.dumps(facts, indent=2) + "\n").encode())
            if target.exists():
                target.rmdir()  # empty, as refuse_taken saw
            os.rename(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        sync_folder(target.parent)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run at `path`.

        Raises:
            RunError: there is none, or its configuration or manifest is damaged.
        """
        run = cls(path)
        if not all((path / name).is_file() for name in ("config.yaml", "manifest.json")):
            raise RunError(
                "This is no run folder.",
                where=str(path),
                got=_contents(path) if path.exists() else "nothing there",
                expected="a folder with config.yaml and manifest.json, as every training command makes",
                todo="Check the path: it is what --out was.",
            )
        _check(path / "config.yaml", lambda: run.config_dict, dict)
        _check(path / "manifest.json", lambda: run.manifest["recipe"], str)
        return run

    def lock(self) -> None:
        """Let no other process train this run until this one ends or forgets the run folder.

        The operating system lets go of the lock however the process ends.

        Raises:
            RunError: another process holds it.
        """
        file = (self.path / ".lock").open("a")  # noqa: SIM115
        weakref.finalize(self, file.close)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RunError(
                "Another process is working on this run.",
                where=str(self.path),
                got="a lock on it, held by a running process",
                expected="one `prefopt` at a time on a run",
                todo="Wait until that one has ended, or stop it; then `prefopt resume` again.",
            ) from error

    @property
    def config_dict(self) -> dict[str, Any]:
        """The resolved configuration the run was started with."""
        loaded: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        return loaded

    @property
    def manifest(self) -> dict[str, Any]:
        """Hashes of what the run is made of, and versions."""
        loaded: dict[str, Any] = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        return loaded

    @property
    def recipe(self) -> str:
        """sft, dpo or another."""
        return str(self.manifest["recipe"])

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Where the trained model is, once the run is finished."""
        return self.path / "model"

    @property
    def stepped(self) -> bool:
        """Whether an optimiser step has begun."""
        return any(event["event"] == "rows" for event in self.events())

    @property
    def finished(self) -> bool:
        """Whether the model has been saved."""
        return any(event["event"] == "finished" for event in self.events())

    def log_metrics(self, step: int, split: str, metrics: Mapping[str, float | int]) -> None:
        """Append one line to metrics.jsonl; numbers are exact.

        Raises:
            NonFiniteError: a metric is NaN or infinite; nothing is written.
        """
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if bad:
            raise NonFiniteError(
                "A metric is not finite.",
                where=f"{split} metrics at step {step}",
                got=", ".join(f"{name} = {value}" for name, value in bad.items()),
                expected="finite numbers",
                todo="Lower --lr or use --dtype float32; `prefopt check` shows rows that stand out.",
            )
        append_line(self.path / "metrics.jsonl", {"step": step, "split": split, **metrics})

    def event(self, event: str, *, step: int, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        append_line(self.path / "events.jsonl", {"time": _now(), "step": step, "event": event, **fields})

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a line torn by a kill is left out.

        Raises:
            RunError: a whole line cannot be read; it is named.
        """
        return read_lines(self.path / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """All lines of events.jsonl, as `metrics`."""
        return read_lines(self.path / "events.jsonl")

    def rewind(self, step: int) -> None:
        """Forget what lost steps recorded: everything at `step` or later but the run's own history.

        Called when a run resumes at `step`, which is then done again. History are the events started,
        path, budget, saved, interrupted, resumed and reward (another one): they did happen.
        """
        metrics = [m for m in self.metrics() if m["step"] < step]
        events = [e for e in self.events() if e["step"] < step or e["event"] in _HISTORY]
        for name, lines in (("metrics.jsonl", metrics), ("events.jsonl", events)):
            path = self.path / name
            if path.exists():
                _say_torn(path, *_split_torn(path))
            write_atomically(path, b"".join(_encoded(line) for line in lines))


def check_manifest(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to go on with other ingredients than the run was started with; versions may differ.

    Raises:
        RunError: names each of model, reference, tokenizer, template and data files that changed.
    """
    named = {
        "model": "model weights",
        "reference": "reference model weights",
        "reward": "reward",
        "tokenizer": "tokenizer",
        "template": "chat template",
    }
    changed = [label for name, label in named.items() if old.get(name) != new.get(name)]
    before, now = old.get("data", {}), new.get("data", {})
    changed += [f"data file {name}" for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise RunError(
            "The run cannot go on: what it was started from has changed.",
            where=", ".join(changed),
            got="another content hash than in manifest.json",
            expected="the same bytes as when the run started, or its numbers would not continue",
            todo="Put the old files back, or start a new run with another --out.",
        )


def _check(path: Path, read: Callable[[], object], kind: type) -> None:
    try:
        found = read()
        if isinstance(found, kind):
            return
        problem = f"a {type(found).__name__}"
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise RunError(
        "The run folder is damaged.",
        where=str(path),
        got=problem,
        expected="what the run wrote there when it started",
        todo="Put the file back from a copy, or start a new run with another --out.",
    )


def unfinished(path: Path) -> bool:
    """Whether a run stands at `path` that `prefopt resume` can go on with."""
    try:
        return (path / "manifest.json").exists() and not RunFolder(path).finished
    except RunError:  # damaged records: nothing to promise
        return False


def _plain(config: BaseModel) -> dict[str, Any]:
    return {k: v for k, v in config.model_dump(mode="json").items() if v is not None}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "a file" if path.exists() else "a link to nothing"
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "an empty folder"


def _encoded(line: Mapping[str, Any]) -> bytes:
    # ASCII only: file names with undecodable bytes are strings that UTF-8 cannot hold.
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a JSON object as one whole line; what a kill left of a line before it is taken away, and said."""
    encoded = _encoded(line)
    if path.exists():
        whole, torn = _split_torn(path)
        if torn:  # or the new line would hang on it, and both were lost
            _say_torn(path, whole, torn)
            os.truncate(path, whole)
    with path.open("ab") as file:
        file.write(encoded)


def _split_torn(path: Path) -> tuple[int, bytes]:
    """Bytes of whole lines, and what stands behind them: a line without its end, cut by a kill or a full disk."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start, tail = size, b""
        while start and b"\n" not in tail:
            start = max(0, start - 4096)
            file.seek(start)
            tail = file.read(size - start)
    torn = tail[tail.rfind(b"\n") + 1 :]
    return size - len(torn), torn


def _say_torn(path: Path, whole: int, torn: bytes) -> None:
    if torn:
        warn(f"the last line of {path} was cut short ({len(torn)} bytes behind byte {whole}) and is left out")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of records, each with a `step`; a torn last line is left out.

    Raises:
        RunError: a whole line cannot be read; it is named.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    found = []
    # Only "\n" ends a line, so the last piece is empty or torn.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
            ok = isinstance(value, dict) and isinstance(value["step"], int)
        except (ValueError, KeyError):
            ok = False
        if not ok:
            raise RunError(
                "A line of the run's records cannot be read.",
                where=f"{path}:{number}",
                got=repr(line[:60]),
                expected="a JSON object with a step, as the run wrote it",
                todo=f"Take line {number} out of the file, or put the file back from a copy.",
            )
        found.append(value)
    return found
