"""Completion groups on disk: read one at a time, so that memory does not grow with the data.

A group is one run of 32-bit numbers: a header (file, row, line, whether it was cut, K, prompt
length, the halves of weight, label and margin, the K completion lengths), the prompt's ids, then the ids of
each completion; a token that is not trained on stands as its complement, a negative number. In memory
stay 14 bytes a row, and 8 for each selection of rows it is in.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt16

from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.scratch import Scratch
from prefopt.records import Source

__all__ = ["GroupStore", "token_counts"]

_HEADER = 12  # numbers in front of the completion lengths
_NO_LINE = -1


@dataclass(frozen=True)
class _Stored:
    """All groups written together."""

    scratch: Scratch
    files: tuple[str, ...]
    starts: Int64[np.ndarray, " stored"]
    tokens: Int32[np.ndarray, " stored"]
    completions: UInt16[np.ndarray, " stored"]


class GroupStore(Sequence[CompletionGroup]):
    """Groups written to a temporary file, or a selection of them; each is built anew when asked for.

    The file is gone with the last selection of it, or with the process.

    Attributes:
        places: Which of the groups written this selection has; `group.place` of each.
    """

    def __init__(self, stored: _Stored, places: Int64[np.ndarray, " rows"]) -> None:
        self._stored = stored
        self.places = places

    @classmethod
    def write(cls, groups: Iterable[CompletionGroup]) -> "GroupStore":
        """A store of `groups`, in their order.

        Raises:
            DataError: the disk is full.
        """
        scratch, files = Scratch(), dict[str, int]()
        starts, tokens, completions = array("q"), array("i"), array("H")
        for group in groups:
            starts.append(scratch.append(_encoded(group, files.setdefault(group.source.file, len(files)))))
            tokens.append(group.tokens)
            completions.append(len(group.completions))
        scratch.flush()
        stored = _Stored(
            scratch,
            tuple(files),
            np.array(starts, dtype=np.int64),
            np.array(tokens, dtype=np.int32),
            np.array(completions, dtype=np.uint16),
        )
        return cls(stored, np.arange(len(starts)))

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> CompletionGroup: ...
    @overload
    def __getitem__(self, index: slice) -> "GroupStore": ...
    def __getitem__(self, index: int | slice) -> "CompletionGroup | GroupStore":
        if isinstance(index, slice):
            return GroupStore(self._stored, self.places[index])
        return self._read(int(self.places[index]))

    def __iter__(self) -> Iterator[CompletionGroup]:
        return (self._read(int(place)) for place in self.places)

    def take(self, indices: Int[np.ndarray, " taken"]) -> "GroupStore":
        """The groups at `indices` of this selection."""
        return GroupStore(self._stored, self.places[indices])

    @property
    def tokens(self) -> Int32[np.ndarray, " rows"]:
        """`group.tokens` of every group, without reading any."""
        tokens: Int32[np.ndarray, " rows"] = self._stored.tokens[self.places]
        return tokens

    @property
    def completions(self) -> UInt16[np.ndarray, " rows"]:
        """K of every group, without reading any."""
        completions: UInt16[np.ndarray, " rows"] = self._stored.completions[self.places]
        return completions

    def _read(self, place: int) -> CompletionGroup:
        stored, k = self._stored, int(self._stored.completions[place])
        numbers = _HEADER + k + int(stored.tokens[place])
        data = np.frombuffer(stored.scratch.read(int(stored.starts[place]), 4 * numbers), dtype=np.int32)
        file, row, line, truncated, _, prompt = data[:6].tolist()
        weight, label, margin = data[6:_HEADER].copy().view(np.float64).tolist()
        ends = np.cumsum(data[_HEADER : _HEADER + k]).tolist()
        start = _HEADER + k + prompt
        return CompletionGroup(
            data[start - prompt : start],
            tuple(_decoded(data[start + a : start + b]) for a, b in zip([0, *ends], ends, strict=False)),
            Source(stored.files[file], row, None if line == _NO_LINE else line),
            weight,
            bool(truncated),
            place,
            label,
            margin,
        )


def token_counts(groups: Sequence[CompletionGroup]) -> Int[np.ndarray, " rows"]:
    """`group.tokens` of every group; of a store without reading it."""
    return groups.tokens if isinstance(groups, GroupStore) else np.array([g.tokens for g in groups], dtype=np.int64)


def _encoded(group: CompletionGroup, file: int) -> bytes:
    source = group.source
    line = _NO_LINE if source.line is None else source.line
    header = [file, source.row, line, int(group.truncated), len(group.completions), len(group.prompt_ids)]
    return np.concatenate(
        [
            np.array(header, dtype=np.int32),
            np.array([group.weight, group.label, group.margin], dtype=np.float64).view(np.int32),
            np.array([len(c.ids) for c in group.completions], dtype=np.int32),
            group.prompt_ids,
            *(np.where(c.trainable, c.ids, ~c.ids) for c in group.completions),
        ]
    ).tobytes()


def _decoded(numbers: Int32[np.ndarray, " tokens"]) -> Completion:
    trainable = numbers >= 0
    return Completion(numbers if trainable.all() else np.where(trainable, numbers, ~numbers), trainable)
