"""Temporary files that hold what would not fit in memory: nameless, so a kill leaves nothing behind."""

import errno
import os
import tempfile
import weakref

from prefopt.errors import DataError

__all__ = ["Scratch", "no_room"]

_BUFFER = 2**18  # bytes written together


def _folder() -> str:
    """`TMPDIR`, or /var/tmp where there is one: /tmp is often memory. SQLite's own choice is the same."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())


class Scratch:
    """Bytes appended to a nameless temporary file, then read at any place, by any thread.

    Reads go past no memory map, so what has been read once does not stay in the process.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=_folder(), buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _refused(error) from error
        self._waiting = bytearray()
        self.size = 0
        weakref.finalize(self, self._file.close)

    def append(self, data: bytes) -> int:
        """Put `data` at the end; returns where it begins.

        Raises:
            DataError: no room is left.
        """
        self._waiting += data
        self.size += len(data)
        if len(self._waiting) >= _BUFFER:
            self.flush()
        return self.size - len(data)

    def flush(self) -> None:
        """Make what was appended readable."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            raise _refused(error) from error

    def read(self, start: int, size: int) -> bytearray:
        """The `size` bytes at `start`, flushed before."""
        data = bytearray(os.pread(self._file.fileno(), size, start))
        assert len(data) == size, "a temporary file is shorter than what was written to it"
        return data


def no_room(got: str, *, full: bool) -> DataError:
    """What to tell the user when temporary files cannot be written."""
    return DataError(
        "There is no room for temporary files." if full else "A temporary file cannot be written.",
        where=_folder(),
        got=got,
        expected="room for the text of the rows, and for 4 bytes a token",
        todo="Free some room, or set TMPDIR to another folder.",
    )


def _refused(error: OSError) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return no_room(str(error.strerror), full=full)
