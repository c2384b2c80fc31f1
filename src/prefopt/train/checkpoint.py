"""Checkpoints that are whole or absent: safetensors and JSON, checksummed, renamed into place last."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt.errors import RunError
from prefopt.run import file_sha256, sync_folder

__all__ = [
    "Checkpoint",
    "load_latest",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "restore_rng",
    "rng_tensors",
    "save_checkpoint",
]

_SUMS = "SHA256SUMS.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its checksums verified."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU."""
        return dict(load_file(self.path / f"{name}.safetensors"))


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder`/step-000120 and prune older ones down to `keep`.

    Files are written in a hidden folder and fsynced, the folder is renamed last, and only then are
    old checkpoints removed: a kill at any moment leaves the last whole one.

    Raises:
        RunError: the disk is full; names path, bytes needed and bytes free. Nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:06d}"
    if final.exists() and _damage(final) is None:
        return final  # the same step holds the same state
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    _refuse_full(folder, needed)
    draft = folder / f".tmp-{final.name}"
    try:
        draft.mkdir()
        for name, group in tensors.items():
            flat = {key: t.detach().cpu().contiguous() for key, t in group.items()}
            save_file(flat, draft / f"{name}.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, **state}))
        sums = {p.name: file_sha256(p) for p in sorted(draft.iterdir())}
        (draft / _SUMS).write_text(json.dumps(sums, indent=1))
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(draft)
        if final.exists():  # damaged
            shutil.rmtree(final)
        os.rename(draft, final)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise _full(folder, needed) from error
        raise
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


def _refuse_full(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise _full(folder, needed)


def _full(folder: Path, needed: int) -> RunError:
    free = shutil.disk_usage(folder).free
    return RunError(
        "The disk is too full for a checkpoint.",
        where=str(folder),
        got=f"{free:,} bytes free",
        expected=f"{needed:,} bytes",
        todo=f"Make room, then `prefopt resume {folder.parent}`; the last whole checkpoint is untouched.",
    )


def load_latest(folder: Path, on_damage: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold, or None.

    Args:
        on_damage: Is told of each damaged checkpoint that is passed over, naming the file.
    """
    for path in reversed(_steps(folder)):
        damage = _damage(path)
        if damage is None:
            state = json.loads((path / "state.json").read_text())
            return Checkpoint(state["step"], path, state)
        on_damage(f"checkpoint {path} is damaged ({damage}); using the one before it")
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words."""
    try:
        sums = json.loads((path / _SUMS).read_text())
        files = dict(sums.items())
    except (OSError, ValueError, AttributeError):
        return f"{_SUMS} cannot be read"
    for name in ("state.json", *files):
        if name not in files or not (path / name).is_file():
            return f"{name} is missing"
        if file_sha256(path / name) != files[name]:
            return f"{name} does not match its checksum"
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors ("3.exp_avg": parameter 3) and what is no tensor as JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{number}.{name}"] = value
    return tensors, scalars


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` took, bit for bit; parameter groups stay the optimiser's own."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def rng_tensors() -> dict[str, Tensor]:
    """States of torch's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Put generators back where `rng_tensors` found them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
