"""Checkpoints that are whole or absent: safetensors and JSON, checksummed, renamed into place last."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefopt.errors import RunError
from prefopt.run import file_sha256, sync_folder

__all__ = [
    "Checkpoint",
    "load_latest",
    "load_step",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "restore_rng",
    "rng_tensors",
    "save_checkpoint",
]

_SUMS = "SHA256SUMS.json"
_NAME = re.compile(r"step-(\d+)")
_ALIASES = "aliases"  # key of the safetensors metadata that names tensors stored once under another name
_ROOM = 1 << 20  # bytes for headers, JSON and folders
# No room on the disk, in the quota, or under the shell's limit on file sizes. The safetensors library
# tells its own error class, with the number in its text.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its checksums verified."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU; names that shared one tensor share it again."""
        with safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
            found: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            aliases: dict[str, str] = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
        return {**found, **{alias: found[original] for alias, original in aliases.items()}}


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder`/step-000120 and prune older ones down to `keep`.

    Files are written in a hidden folder and fsynced, the folder is renamed last, and only then are
    old checkpoints removed: a kill at any moment leaves the last whole one. A step that is already
    saved whole stays as it is.

    Args:
        tensors: Name of a file, without its ending, to the tensors in it.
        state: Whatever else is to be kept; JSON.

    Raises:
        RunError: the disk is full; names path, bytes needed and bytes free. Nothing is left behind.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:06d}"
    if final.exists() and _damage(final) is None:  # the same step holds the same state
        _prune(folder, step, keep)  # a kill may have come just before
        return final
    flat = {name: _stored_once(group) for name, group in tensors.items()}
    needed = _ROOM + sum(t.nbytes for group, _ in flat.values() for t in group.values())
    if shutil.disk_usage(folder).free < needed:
        raise _full(folder, needed)
    draft = folder / f".tmp-{final.name}"
    try:
        _write(draft, flat, {**state, "step": step})
        if final.exists():  # damaged
            shutil.rmtree(final)
        os.rename(draft, final)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        if getattr(error, "errno", None) in _FULL or _FULL_TEXT.search(str(error)):
            raise _full(folder, needed) from error
        raise
    _prune(folder, step, keep)
    return final


def _stored_once(group: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, none sharing memory with another, and which names stand for which.

    The same tensor under several names (tied weights) is stored under the first; parts of one
    buffer are copied, since the format refuses overlapping memory.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, value in group.items():
        tensor = value.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        identity = (*storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        copied = tensor.cpu().contiguous()
        # A part of a larger buffer is copied too, or the whole buffer were written.
        shared = storage in storages or copied.untyped_storage().nbytes() != copied.nbytes
        stored[name] = copied.clone() if shared else copied
        storages.add(storage)
    return stored, aliases


def _write(draft: Path, flat: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]], state: Mapping[str, Any]) -> None:
    draft.mkdir()
    for name, (tensors, aliases) in flat.items():
        # One key of metadata: the library writes several in random order, and files should be reproducible.
        save_file(tensors, draft / f"{name}.safetensors", metadata={_ALIASES: json.dumps(aliases)})
    (draft / "state.json").write_text(json.dumps(state, allow_nan=False))
    sums = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
    (draft / _SUMS).write_text(json.dumps(sums))
    for path in sorted(draft.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(draft)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the last `keep` up to `step`.

    A later step's checkpoint can only be one that was passed over as damaged: it must not push out
    the good ones, and goes once it is seen to be bad.
    """
    paths = _steps(folder)
    old = [path for number, path in paths if number <= step][:-keep]
    for path in old + [path for number, path in paths if number > step and _damage(path)]:
        shutil.rmtree(path)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, the earliest first."""
    named = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def _full(folder: Path, needed: int) -> RunError:
    free = shutil.disk_usage(folder).free
    return RunError(
        "The disk is too full for a checkpoint.",
        where=str(folder),
        got=f"{free:,} bytes free" + ("" if free < needed else ", but a quota or a limit on file sizes is reached"),
        expected=f"{needed:,} bytes",
        todo=f"Make room, then `prefopt resume {folder.parent}`; the last whole checkpoint is untouched.",
    )


def load_latest(folder: Path, on_damage: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold, or None.

    Args:
        on_damage: Is told of each damaged checkpoint that is passed over, naming the file.
    """
    for step, path in reversed(_steps(folder)):
        damage = _damage(path)
        if damage is None:
            return Checkpoint(step, path, json.loads((path / "state.json").read_bytes()))
        on_damage(f"checkpoint {path} is damaged ({damage}); using the one before it")
    return None


def load_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step.

    Raises:
        RunError: it is gone or damaged.
    """
    path = folder / f"step-{step:06d}"
    damage = _damage(path) if path.exists() else "it is gone"
    if damage is not None:
        raise RunError(
            "A checkpoint cannot be read.",
            where=str(path),
            got=damage,
            expected="the checkpoint that the run saved there",
            todo=f"Put it back, or move {folder.parent} away and train that run again.",
        )
    return Checkpoint(step, path, json.loads((path / "state.json").read_bytes()))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words."""
    try:
        sums = json.loads((path / _SUMS).read_bytes())
    except (OSError, ValueError):
        return f"{_SUMS} is missing or unreadable"
    for name in sorted({"state.json", *sums}):
        try:
            if file_sha256(path / name) != sums.get(name):
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors ("3.exp_avg": parameter 3) and what is no tensor as JSON."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, state in whole["state"].items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{number}.{name}"] = value
    return tensors, {"scalars": scalars, "param_groups": whole["param_groups"]}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` took, bit for bit, parameter groups included.

    Raises:
        RunError: the state is of another optimiser or of other parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    saved = state["param_groups"]
    if [(group.keys(), group["params"]) for group in own] != [(group.keys(), group["params"]) for group in saved]:
        raise RunError(
            "The checkpoint's optimiser state does not fit.",
            where="optimizer, or what is trained",
            got=f"state for {_outline(saved)}",
            expected=_outline(own),
            todo="Resume with the configuration the run was started with.",
        )
    # JSON has no tuples.
    groups = [
        {key: tuple(value) if isinstance(mine[key], tuple) else value for key, value in theirs.items()}
        for mine, theirs in zip(own, saved, strict=True)
    ]
    by_parameter: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **state["scalars"]}.items():
        number, _, key = name.partition(".")
        by_parameter.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": by_parameter, "param_groups": groups})


def _outline(groups: list[dict[str, Any]]) -> str:
    parameters = sum(len(group["params"]) for group in groups)
    return f"{parameters} tensors with " + ", ".join(sorted(groups[0].keys() - {"params"}))


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
