"""A JSON array read in pieces against `json.loads` of the whole, wherever the pieces are cut."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.data import files, json_array
from prefopt.data.audit import Refusal
from prefopt.data.files import file_rows
from prefopt.errors import DataError

DOCUMENT = r"""
 [ {"text": "a \"story\", [1]}", "é": "日本 😀", "n": [0, -0, -0.0, 12e+5, 1.5E-3, 1e400,
 123456789012345678901234567890]},
   true,false , null, NaN, -Infinity, 12.25, -7e-10, 3, "", [], {}, [[{"deep": [""]}]],
   {"twice": 1, "twice": 2}, "\ud83d\ude00 \ud800 \udc80 \u0000 \\", "]" , 42	]

"""

BROKEN = [
    '[{"text": "x"},\n{"text": }\n, {"text": "never looked at, as the array breaks before it"}]',
    '[{"text": "x"}\n {"text": "y"}, {"text": "never looked at, as the array breaks before it"}]',
    "\n[\n1,\n\n2, 3}, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]",
    '[{"text" "x"}, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]',
    '["\\x", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]',
    '["\\u12g4", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]',
    '["line\nbreak", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]',
    "[01]",
    "[1.]",
    "[,]",
    "[1, 2]]",
    '[1, 2]\n[3]\n{"text": "x"}',
]


def _elements(data: bytes, longest: int = 1000) -> Iterator[Any]:
    return json_array.array_elements(io.BytesIO(data), Path("a.json"), b"", longest, 64)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 16, 17, 31, 64, 1000])
def test_wherever_the_pieces_are_cut_the_values_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(json_array, "_PIECE", piece)
    for space in range(40):  # the cuts stand elsewhere each time
        text = " " * space + DOCUMENT
        assert repr(list(_elements(text.encode()))) == repr(json.loads(text))  # NaN equals nothing, its repr does


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_array_is_told_as_json_would_tell_it(monkeypatch: pytest.MonkeyPatch, piece: int, text: str) -> None:
    monkeypatch.setattr(json_array, "_PIECE", piece)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(DataError, match="not valid JSON") as caught:
        list(_elements(text.encode()))
    assert (caught.value.got or "").removesuffix("; the array is never closed") == str(expected.value)
    assert caught.value.where == f"a.json:{expected.value.lineno}"


@pytest.mark.parametrize("piece", [3, 1000])
def test_an_array_cut_short_anywhere_is_never_closed(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_array, "_PIECE", piece)
    text = DOCUMENT.rstrip()
    for length in range(text.index("[") + 1, len(text)):
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text[:length])
        with pytest.raises(DataError) as caught:
            list(_elements(text[:length].encode()))
        closed = text[:length].endswith("]")  # by the look of its end
        assert caught.value.got == str(expected.value) + ("" if closed else "; the array is never closed")
        assert caught.value.where == f"a.json:{expected.value.lineno}"


@pytest.mark.parametrize("piece", [1, 1000])
def test_bytes_that_are_no_utf8_cost_their_element(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_array, "_PIECE", piece)
    found = list(_elements(b'["\\udc80", "a\xffb", {"k\xe6\x97": 1}, "\xed\xa0\x80", "\xe6\x97\xa5"]'))
    assert [v.reason if isinstance(v, Refusal) else v for v in found] == [
        "\udc80",  # an escape of JSON's, no byte of the file
        "invalid_utf8",
        "invalid_utf8",
        "invalid_utf8",
        "日",
    ]


def test_a_broken_element_is_told_without_reading_on() -> None:
    stream = io.BytesIO(b'[{"text": "x"}, {"text" "y"}' + b', {"text": "more"}' * 1_000_000 + b"]")
    with pytest.raises(DataError, match="Expecting ':' delimiter"):
        list(json_array.array_elements(stream, Path("a.json"), b"", 2**24, 64))
    assert stream.tell() <= 2**20


@pytest.mark.parametrize("piece", [1, 64, 1000])
def test_an_element_beyond_the_limit_is_an_error_of_the_file(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_array, "_PIECE", piece)
    fits = '"' + "x" * 98 + '"'
    assert len(list(_elements(f"[{fits},\n{fits}]".encode(), longest=100))) == 2
    for long in ('"x' + fits[1:], fits[:-1] + "x" * 10_000):
        elements = _elements(f"[{fits},\n{long}".encode() + b"]", longest=100)
        assert next(elements) == "x" * 98
        with pytest.raises(DataError) as caught:
            next(elements)
        assert caught.value.where == "a.json:2"


def test_too_many_digits_and_too_many_levels_name_their_line() -> None:
    with pytest.raises(DataError, match="digits") as digits:
        list(_elements(b"[1,\n" + b"1" * 5000 + b"]"))
    with pytest.raises(DataError, match="nested too deeply") as levels:
        list(_elements(b"[1,\n2,\n" + b"[" * 100_000 + b"]" * 100_001))
    assert (digits.value.where, levels.value.where) == ("a.json:2", "a.json:3")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_the_memory_held_does_not_grow_with_the_rows(tmp_path: Path, name: str) -> None:
    def peak(rows: int) -> int:
        text = json.dumps([{"prompt": f"{n}", "chosen": "x" * 5000, "rejected": "y" * 5000} for n in range(rows)])
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode(), 1) if name.endswith("gz") else text.encode())
        del text
        tracemalloc.start()
        try:
            assert sum(len(raw.values) == 3 for raw in file_rows(path)) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = peak(300)  # 3 MB of text, which is several pieces already
    assert peak(3_000) < 1.1 * few < 10 * 2**20


def test_space_in_front_of_an_array_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\n" * 3_000_000 + b'["a story", "another"]')  # more than is looked at together
    assert [raw.values for raw in file_rows(path)] == ["a story", "another"]
    path.write_bytes(b"\n" * 3_000_000 + b'["a story", ')
    with pytest.raises(DataError) as caught:
        list(file_rows(path))
    assert caught.value.where == f"{path}:3000001"
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 5)
    with pytest.raises(DataError, match="too long"):
        list(file_rows(path))
