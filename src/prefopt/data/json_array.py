"""A JSON array, one element at a time: no more of the file is held than the element at hand needs.

`json` parses what is held; where that ends within an element, more is read and the element parsed anew.
docs/log.md says why this is no library.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.data.audit import Refusal
from prefopt.errors import DataError

__all__ = ["array_elements", "checked"]

_PIECE = 2**20  # bytes read at a time
_TAIL = 16  # no token but a string is cut short further than this from the end of what is held
_SPACE = re.compile(r"[ \t\n\r]*")


def checked(values: Any, text: str) -> Any:
    """`values`, or a Refusal where surrogateescape had to stand in for bytes of the text they come from.

    Surrogates that JSON's own escapes name are not in the text, and do not count.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return Refusal("invalid_utf8", "the row holds bytes that are not UTF-8")
    return values


def array_elements(stream: io.BufferedIOBase, path: Path, start: bytes, longest: int, deepest: int) -> Iterator[Any]:
    """Elements of the array in `stream`, as `json.loads` gives them; a Refusal where bytes are no UTF-8.

    Args:
        start: Space in front of the array, which has been read already.
        longest: Characters that one element may have.
        deepest: Levels of nesting to name where there are too many for Python.

    Raises:
        DataError: the array is broken, or an element too long; those before it have been given by then.
    """
    window = _Window(stream, path, start, longest, deepest)
    window.next_char()
    window.at += 1  # the bracket
    comma = False
    while comma or window.next_char() != "]":
        yield window.element()
        comma = window.next_char() == ","
        if not comma and window.next_char() != "]":
            raise window.broken("Expecting ',' delimiter", window.at)
        window.at += comma
    window.at += 1
    if window.next_char():
        raise window.broken("Extra data", window.at)


class _Window:
    """The part of the text that is held; `at` is where we are in it."""

    def __init__(self, stream: io.BufferedIOBase, path: Path, start: bytes, longest: int, deepest: int) -> None:
        self._stream = stream
        self._path = path
        self._longest = longest
        self._deepest = deepest
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._scan = json.JSONDecoder().raw_decode
        self._text = self._decode(start)
        self._ended = False
        self._lines, self._columns, self._chars = 0, 0, 0  # in front of the window
        self.at = 0

    def next_char(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._read_on(_PIECE)

    def element(self) -> Any:
        """The next element, however often more has to be read for it."""
        self.next_char()
        while True:
            found = self._parsed()
            if found:
                values, end = found
                self._check_length(end - self.at)
                text, self.at = self._text[self.at : end], end
                return checked(values, text)
            held = len(self._text) - self.at
            self._check_length(held - _TAIL)
            self._read_on(max(held, _PIECE))  # doubled, so that a long element is not parsed anew too often

    def _parsed(self) -> tuple[Any, int] | None:
        """The element and where it ends; None where more has to be read to tell."""
        try:
            values, end = self._scan(self._text, self.at)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or len(self._text) - error.pos <= _TAIL
            if cut and not self._ended:
                return None
            raise self.broken(error.msg, error.pos) from error
        except RecursionError as error:
            expected = f"at most {self._deepest} levels"
            raise DataError("The JSON file is nested too deeply.", where=self._place(), expected=expected) from error
        except ValueError as error:  # a number of too many digits
            raise self._invalid(str(error), self._place()) from error
        return None if len(self._text) - end <= _TAIL and not self._ended else (values, end)

    def _check_length(self, length: int) -> None:
        if length > self._longest:
            raise DataError(
                "An element of the JSON array is too long, or never closed.",
                where=self._place(),
                got=f"more than {self._longest:,} characters",
                expected="an array of rows",
                todo="Mend the file there; an array inside something else has to stand alone.",
            )

    def _read_on(self, size: int) -> None:
        """Forget what is behind, hold more."""
        self._lines, self._columns, self._chars = self._position(self.at)
        data = self._stream.read(size)
        self._ended = not data
        self._text = self._text[self.at :] + self._decode(data, self._ended)
        self.at = 0

    def _position(self, at: int) -> tuple[int, int, int]:
        """Lines, columns and characters of the file in front of a place in the window."""
        newlines = self._text.count("\n", 0, at)
        columns = at - self._text.rindex("\n", 0, at) - 1 if newlines else self._columns + at
        return self._lines + newlines, columns, self._chars + at

    def _place(self) -> str:
        """Where we are, for people."""
        return f"{self._path}:{self._position(self.at)[0] + 1}"

    def broken(self, message: str, at: int) -> DataError:
        """What `json.loads` would say of the whole file, of a place in the window."""
        lines, columns, chars = self._position(at)
        cut = "; the array is never closed" if self._ended and not self._text.rstrip().endswith("]") else ""
        got = f"{message}: line {lines + 1} column {columns + 1} (char {chars}){cut}"
        return self._invalid(got, f"{self._path}:{lines + 1}")

    def _invalid(self, got: str, where: str) -> DataError:
        return DataError(
            "The file is not valid JSON.",
            where=where,
            got=got,
            expected="one array of objects, or one object a line",
            todo="Write the file again; as JSON lines (.jsonl) a broken row costs only itself.",
        )
