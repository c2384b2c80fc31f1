"""A run folder: resolved configuration, manifest, metrics and events, written so that a kill costs nothing."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from prefopt.errors import RunError

__all__ = ["RunFolder", "check_manifest", "file_sha256", "sync_folder", "write_atomically"]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """`path` holds all of `content` or what it held before, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files; this one is as any other
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. `create` makes it, `open` finds it again."""

    path: Path

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Raise RunError if anything stands at `path`; cheap, so recipes ask before they load a model."""
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if (path / "config.yaml").exists() and not RunFolder(path).finished:
            todo = f"Go on with it by `prefopt resume {path}`, or choose another --out."
        else:
            todo = "Choose another --out; nothing is ever written over."
        raise RunError("The output folder is not empty.", where=str(path), got=_contents(path), todo=todo)

    @classmethod
    def create(cls, path: Path, *, recipe: str, config: BaseModel, manifest: Mapping[str, Any]) -> "RunFolder":
        """A new run folder, whole or not at all.

        Raises:
            RunError: something stands at `path` already.
        """
        cls.refuse_taken(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            draft.chmod(0o755)
            write_atomically(draft / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False).encode())
            facts = {"recipe": recipe, "created": _now(), **manifest}
            write_atomically(draft / "manifest.json", (json.dumps(facts, indent=2) + "\n").encode())
            if path.exists():
                path.rmdir()  # empty, as refuse_taken saw
            os.rename(draft, path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        sync_folder(path.parent)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run at `path`.

        Raises:
            RunError: there is none, or its configuration or manifest is damaged.
        """
        run = cls(path)
        try:
            ok = isinstance(run.config_dict, dict) and isinstance(run.manifest.get("recipe"), str)
        except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
            raise RunError(
                "This is no run folder.",
                where=str(path),
                got=_contents(path) if path.exists() else "nothing there",
                expected="a folder with config.yaml and manifest.json, as `prefopt sft` and `prefopt dpo` make",
            ) from error
        if not ok:
            raise RunError("The run folder is damaged.", where=str(path / "manifest.json"), expected="a recipe's name")
        return run

    @property
    def config_dict(self) -> dict[str, Any]:
        """The resolved configuration the run was started with."""
        loaded: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text())
        return loaded

    @property
    def manifest(self) -> dict[str, Any]:
        """Hashes of what the run is made of, and versions."""
        loaded: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return loaded

    @property
    def recipe(self) -> str:
        """sft or dpo."""
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
    def finished(self) -> bool:
        """Whether the model has been saved."""
        return any(event["event"] == "finished" for event in self.events())

    def log_metrics(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; numbers are exact.

        Raises:
            ValueError: a metric is NaN or infinite (a bug: steps check before they log).
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {name} at step {step} is {value}")
        _append(self.path / "metrics.jsonl", {"step": step, "split": split, **metrics})

    def event(self, event: str, *, step: int, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        _append(self.path / "events.jsonl", {"time": _now(), "step": step, "event": event, **fields})

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a line torn by a kill is left out."""
        return _lines(self.path / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """All lines of events.jsonl; a line torn by a kill is left out."""
        return _lines(self.path / "events.jsonl")

    def rewind(self, step: int) -> None:
        """Forget what lost steps recorded: everything at `step` or later but the run's own history.

        Called when a run resumes at `step`, which is then done again.
        """
        history = {"started", "path", "saved", "interrupted", "resumed"}
        metrics = [m for m in self.metrics() if m["step"] < step]
        events = [e for e in self.events() if e["step"] < step or e["event"] in history]
        for name, lines in (("metrics.jsonl", metrics), ("events.jsonl", events)):
            write_atomically(self.path / name, "".join(json.dumps(line) + "\n" for line in lines).encode())


def check_manifest(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to go on with other ingredients than the run was started with.

    Raises:
        RunError: names each of model, reference, tokenizer, template and data files that changed.
    """
    changed = [name for name in ("model", "reference", "tokenizer", "template") if old.get(name) != new.get(name)]
    files = {**old.get("data", {}), **new.get("data", {})}
    changed += [f for f in files if old.get("data", {}).get(f) != new.get("data", {}).get(f)]
    if changed:
        raise RunError(
            "The run cannot go on: what it was started from has changed.",
            where=", ".join(changed),
            got="another content hash than in manifest.json",
            todo="Put the old files back, or start a new run with another --out.",
        )


def _plain(config: BaseModel) -> dict[str, Any]:
    return {k: v for k, v in config.model_dump(mode="json").items() if v is not None}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "an empty folder"


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a kill while appending leaves a last line without its end
    return [json.loads(line) for line in whole.splitlines()]
