"""Records on their way to tokens, on disk; and which of them say the same or the opposite of an earlier one."""

import hashlib
import pickle
import sqlite3
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from prefopt.data.scratch import Scratch, no_room
from prefopt.records import Comparison, Content, Demonstration, Ranking, Record, Source

__all__ = ["Earlier", "Records", "Seen", "identity"]

_CHUNK = 256  # records written and read together


class Records:
    """Records in the order they were added, in a temporary file; a byte a row stays in memory.

    They can be gone through again and again. A record can be dropped later on: only a later row
    tells that two contradict each other.
    """

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._chunks = array("q")  # where each begins
        self._waiting: list[Record] = []
        self._kept = bytearray()

    @property
    def written(self) -> int:
        """Records added, dropped ones included: the place of the next one."""
        return len(self._kept)

    def append(self, record: Record) -> None:
        """Add a record."""
        self._kept.append(True)
        self._waiting.append(record)
        if len(self._waiting) == _CHUNK:
            self.flush()

    def drop(self, place: int) -> None:
        """Leave out the record at `place`, counted from 0 among all that were added."""
        self._kept[place] = False

    def flush(self) -> None:
        """Write what waits; called once more after the last record."""
        if self._waiting:
            self._chunks.append(self._scratch.append(pickle.dumps(self._waiting, pickle.HIGHEST_PROTOCOL)))
            self._waiting = []
        self._scratch.flush()

    def __len__(self) -> int:
        return self._kept.count(True)

    def __iter__(self) -> Iterator[Record]:
        for number, (start, end) in enumerate(pairwise([*self._chunks, self._scratch.size])):
            # Our own nameless file: nobody else can have written what is unpickled here.
            records: list[Record] = pickle.loads(self._scratch.read(start, end - start))
            for place, record in enumerate(records, number * _CHUNK):
                if self._kept[place]:
                    yield record


@dataclass(frozen=True, slots=True)
class Earlier:
    """The first row that compared or judged the same: which way round, and its place among the records."""

    way: bool
    place: int
    source: Source


class Seen:
    """What has been compared or judged so far, in a temporary database: nothing a row stays in memory."""

    def __init__(self) -> None:
        # SQLite's nameless file, in the same folder as ours. One thread uses it; any may collect and so close it.
        self._db = sqlite3.connect("", check_same_thread=False)
        weakref.finalize(self, self._db.close)
        self._db.execute(
            "CREATE TABLE seen (key BLOB PRIMARY KEY, way INTEGER, place INTEGER, file INTEGER, row INTEGER,"
            " line INTEGER) WITHOUT ROWID"
        )
        self._files: dict[str, int] = {}

    def first(self, key: bytes, way: bool, place: int, source: Source) -> Earlier | None:
        """The earlier row with this key; None if this is the first one, which is then remembered.

        Raises:
            DataError: the disk is full.
        """
        file = self._files.setdefault(source.file, len(self._files))
        values = (key, way, place, file, source.row, source.line)
        try:
            new = self._db.execute("INSERT INTO seen VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", values).rowcount
        except sqlite3.OperationalError as error:
            raise no_room(str(error), full="full" in str(error)) from error
        if new:
            return None
        found = self._db.execute("SELECT way, place, file, row, line FROM seen WHERE key = ?", (key,)).fetchone()
        earlier_way, place, file, row, line = found
        return Earlier(bool(earlier_way), place, Source(list(self._files)[file], row, line))


def identity(record: Record) -> tuple[bytes, bool]:
    """A 16-byte hash of what is compared or judged, and which of two opposite things is said of it."""
    prompt = _digest(record.prompt)
    if isinstance(record, Comparison):
        chosen, rejected = _digest(record.chosen), _digest(record.rejected)
        return _hash(b"pair", prompt, *sorted((chosen, rejected))), chosen < rejected
    if isinstance(record, Ranking):
        return _hash(b"rank", prompt, *map(_digest, record.completions)), True
    completion = _digest(record.completion)
    if isinstance(record, Demonstration):
        return _hash(b"show", prompt, completion), True
    return _hash(b"rate", prompt, completion), record.label


def _hash(kind: bytes, *digests: bytes) -> bytes:
    return hashlib.blake2b(b"".join(digests), digest_size=16, person=kind).digest()


def _digest(content: Content) -> bytes:
    digest = hashlib.blake2b(digest_size=16, person=b"text" if isinstance(content, str) else b"messages")
    for part in [content] if isinstance(content, str) else [text for m in content for text in (m.role, m.content)]:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
