"""What goes to disk comes back: token stores, spooled records, and rows that say what others said."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.scratch import Scratch
from prefopt.data.spool import Records, Seen
from prefopt.data.store import GroupStore, token_counts
from prefopt.errors import DataError
from prefopt.records import Comparison, Demonstration, Message, Record, Source
from tiny import completion, group, random_groups


def same(a: CompletionGroup, b: CompletionGroup) -> bool:
    facts = [(g.source, g.weight, g.label, g.margin, g.truncated, g.prompt_ids.tolist()) for g in (a, b)]
    arrays = [[(c.ids.tolist(), c.trainable.tolist()) for c in g.completions] for g in (a, b)]
    kinds = {(c.ids.dtype, c.trainable.dtype) for c in b.completions}
    return facts[0] == facts[1] and arrays[0] == arrays[1] and kinds <= {(np.dtype(np.int32), np.dtype(bool))}


IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
SIDES = st.lists(st.tuples(IDS, st.integers(0, 63)), max_size=4)


@given(
    st.lists(
        st.tuples(IDS, SIDES, st.sampled_from(["a.jsonl", "b\udcff"]), st.none() | st.integers(1, 9), st.booleans())
    )
)
def test_a_store_gives_back_what_was_written(
    rows: list[tuple[list[int], list[tuple[list[int], int]], str, int | None, bool]],
) -> None:
    written = [
        CompletionGroup(
            np.array(prompt, dtype=np.int32),
            tuple(
                Completion(np.array(ids, dtype=np.int32), np.array([bool(bits >> i & 1) for i in range(len(ids))]))
                for ids, bits in sides
            ),
            Source(file, number + 1, line),
            weight=1 / (number + 3),
            label=1 / (number + 5),
            margin=number / 7,
            truncated=cut,
        )
        for number, (prompt, sides, file, line, cut) in enumerate(rows)
    ]
    store = GroupStore.write(iter(written))
    assert len(store) == len(written)
    assert all(same(a, b) for a, b in zip(written, store, strict=True))
    assert [g.place for g in store] == list(range(len(written)))
    assert store.tokens.tolist() == [g.tokens for g in written] == token_counts(written).tolist()
    assert store.completions.tolist() == [len(g.completions) for g in written]


def test_selections_keep_the_places_of_the_whole() -> None:
    groups = random_groups([(3, n, 2) for n in range(1, 8)])
    store = GroupStore.write(groups)
    odd = store.take(np.array([5, 3, 1]))
    assert [g.place for g in odd] == [5, 3, 1] and [g.source.row for g in odd] == [6, 4, 2]
    assert odd[-1].place == 1 and [g.place for g in odd[1:]] == [3, 1]
    assert odd.take(np.array([0])).tokens.tolist() == [groups[5].tokens]
    with pytest.raises(IndexError):
        odd[3]
    del store  # the file lasts as long as any selection of it
    assert same(groups[3], odd[1])
    assert not odd[:0] and GroupStore.write([]).tokens.tolist() == []


def test_keys_are_those_of_the_group_written() -> None:
    one = group([1, 2], completion(3, 4, trainable=[True, False]), completion(5))
    (read,) = GroupStore.write([one])
    assert [read.sequence_key(k) for k in (0, 1)] == [one.sequence_key(k) for k in (0, 1)]


def test_records_come_back_in_order_without_the_dropped_ones() -> None:
    turns = (Message("user", "q"), Message("assistant", "a\u2603"))
    written: list[Record] = [Demonstration("p", f"c{n}", Source("f", n, n)) for n in range(1, 600)]
    written.append(Comparison(turns[:1], turns[1:], (), Source("g\udcff", 7), 0.5))
    records = Records()
    for record in written:
        records.append(record)
    records.flush()
    for place in (0, 256, 511):
        records.drop(place)
    kept = [record for place, record in enumerate(written) if place not in (0, 256, 511)]
    assert len(records) == len(kept) and list(records) == kept
    pairs = [(a, b) for a, b in zip(records, records, strict=True)]  # two readers at once
    assert pairs == [(record, record) for record in kept]


def test_only_the_first_row_with_a_key_is_remembered() -> None:
    seen = Seen()
    assert seen.first(b"k", True, 0, Source("a", 1, 1)) is None
    assert seen.first(b"l", True, 1, Source("b", 1, None)) is None
    again = seen.first(b"k", False, 2, Source("b", 2, None))
    assert again is not None and (again.way, again.place, again.source) == (True, 0, Source("a", 1, 1))
    other = seen.first(b"l", True, 2, Source("b", 3, None))
    assert other is not None and (other.way, other.place, other.source) == (True, 1, Source("b", 1, None))


def test_temporary_files_have_no_name_and_their_folder_is_named_when_it_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    scratch = Scratch()
    starts = [scratch.append(b"abc"), scratch.append(b"de")]
    scratch.flush()
    assert starts == [0, 3] and scratch.read(2, 3) == b"cde"
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(DataError, match="temporary") as caught:
        Scratch()
    assert caught.value.where == str(tmp_path / "missing")


def test_a_full_disk_is_said() -> None:
    scratch = Scratch()
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), scratch._file.fileno())
    scratch.append(b"x")
    with pytest.raises(DataError, match="no room"):
        scratch.flush()
