"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from prefopt.errors import RunError

__all__ = ["allowed", "sync_folder", "write_together"]


def write_together(files: Mapping[Path, bytes | Iterable[bytes]]) -> None:
    """Every path holds all of its content, given whole or in pieces; if any cannot be written, all stay as they were.

    Contents are gone through one after the other. A link is followed: what it points to is written.

    Raises:
        RunError: a path is a folder or a device, which cannot be replaced whole.
    """
    contents = {path.resolve(): content for path, content in files.items()}
    for path in contents:
        _refuse_what_is_no_file(path)
    drafts: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            drafts[path] = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, allowed(0o666))  # mkstemp makes private files; this one is as any other
        for path, draft in drafts.items():
            os.replace(draft, path)
    except BaseException:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in contents}:
        sync_folder(folder)


def _refuse_what_is_no_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise RunError(
            "The output cannot be written here.",
            where=str(path),
            got="a folder" if path.is_dir() else "a pipe or a device",
            expected="a file, or a name that is free",
            todo="Choose another place.",
        )


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allowed(mode: int) -> int:
    """What the user's mask leaves of a file's mode."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask
