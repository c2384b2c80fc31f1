"""Reference log-probabilities: computed once, kept in a content-addressed cache.

The key of an entry is (what scored: hash of weights and adapter, dtype) and (what was scored: hash
of prompt, completion and mask tokens). Another beta, loss, subset, order, seed or epoch count asks
for the same keys and finds them. One SQLite file under the user's cache folder holds all of it;
entries are committed a batch at a time, so a killed pass goes on where it stopped.
"""

import os
import sqlite3
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import platformdirs
import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor

from prefopt.data.bins import consecutive_bins
from prefopt.data.feed import scored
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.errors import DataError
from prefopt.progress import progress, say

__all__ = ["ReferenceCache", "cache_folder", "reference_logprobs"]

_KEYS_AT_ONCE = 10_000  # looked up together
_MOST_VARIABLES = 500  # of one SQL statement
_KEY_BYTES = 16  # of the content hash of a sequence

Entries = Mapping[bytes, tuple[float, int]]


def cache_folder() -> Path:
    """`PREFOPT_CACHE`, or the user's cache folder of this platform."""
    override = os.environ.get("PREFOPT_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("prefopt", appauthor=False)


class ReferenceCache:
    """Log-probability sums (nats) and token counts of sequences under one model.

    Args:
        folder: Where `reference.sqlite` is, made if missing.
        model_key: What scores: weights fingerprint and dtype.
    """

    def __init__(self, folder: Path, model_key: str) -> None:
        self.path = folder / "reference.sqlite"
        self.model_key = model_key
        folder.mkdir(parents=True, exist_ok=True)
        with self._connect() as db, db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS logprobs (model TEXT, sequence BLOB, logprob_sum REAL NOT NULL,"
                " tokens INTEGER NOT NULL, PRIMARY KEY (model, sequence)) WITHOUT ROWID"
            )

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                # With a write-ahead log a killed process loses nothing and a power cut the last
                # entries, which are computed again; a commit then need not wait for the disk.
                db.execute("PRAGMA synchronous = NORMAL")
                yield db
        except sqlite3.DatabaseError as error:
            raise DataError(
                "The cache of reference log-probabilities cannot be used.",
                where=str(self.path),
                got=str(error),
                expected="a readable SQLite file with room to grow",
                todo="Delete that file (its entries are computed again) or set PREFOPT_CACHE to another folder.",
            ) from error

    def get(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, int]]:
        """(log-probability sum, token count) of the keys that are known."""
        found: dict[bytes, tuple[float, int]] = {}
        with self._connect() as db:
            for start in range(0, len(keys), _MOST_VARIABLES):
                part = keys[start : start + _MOST_VARIABLES]
                rows = db.execute(
                    "SELECT sequence, logprob_sum, tokens FROM logprobs WHERE model = ? AND sequence IN "
                    f"({', '.join('?' * len(part))})",
                    (self.model_key, *part),
                )
                found.update((key, (value, tokens)) for key, value, tokens in rows)
        return found

    @contextmanager
    def writer(self) -> Iterator[Callable[[Entries], None]]:
        """A function that commits entries, over one connection; the same key written twice keeps the later value."""
        with self._connect() as db:

            def put(entries: Entries) -> None:
                with db:
                    db.executemany(
                        "INSERT OR REPLACE INTO logprobs VALUES (?, ?, ?, ?)",
                        [(self.model_key, key, value, tokens) for key, (value, tokens) in entries.items()],
                    )

            yield put

    def put(self, entries: Entries) -> None:
        """Commit entries."""
        with self.writer() as put:
            put(entries)


def reference_logprobs(
    groups: Sequence[CompletionGroup],
    cache: ReferenceCache,
    score: Callable[[PackedBatch], Float[Tensor, " sequences"]],
    *,
    tokens_per_batch: Callable[[], int],
    device: torch.device,
) -> Float32[Tensor, "rows completions"]:
    """Log-probability sums (nats) of every completion under the reference.

    Rows stand as in `groups`, completions in their order; NaN where a group has fewer than others.
    Each distinct sequence is scored once, and those of one prompt together.

    Args:
        score: The reference's log-probability sums of a batch on `device`.
        tokens_per_batch: Asked for the budget of a forward pass if anything is missing; the longest
            are scored first.

    Returns:
        The table, on `device`.

    Raises:
        DataError: the reference gives NaN or infinity; names the row.
    """
    sequences = _Sequences.of(groups)
    distinct, first, same = np.unique(sequences.keys, return_index=True, return_inverse=True)
    values = _cached(cache, distinct)
    missing = first[np.isnan(values)]
    if not len(missing):
        say(f"reference log-probabilities: all {len(distinct):,} sequences found in the cache ({cache.path})")
        return sequences.by_row(values[same]).to(device)
    say(f"reference log-probabilities: {len(missing):,} of {len(distinct):,} sequences to score")
    budget = tokens_per_batch()
    jobs = _Jobs.of(sequences, missing, budget)
    parts = [[jobs.members(int(job)) for job in part] for part in consecutive_bins(jobs.tokens, budget)]
    batches = scored(([_group(groups, sequences, job) for job in part] for part in parts), score, device)
    total = int(jobs.tokens.sum())
    with progress("reference", total=total, unit="tokens") as bar, cache.writer() as put, torch.no_grad():
        for part, (batch, results) in zip(parts, batches, strict=True):
            members, sums = np.concatenate(part), results.numpy()
            if not np.isfinite(sums).all():
                raise _not_finite(groups, sequences.rows[members], sums)
            found = zip(sums.tolist(), batch.token_counts.tolist(), strict=True)
            put(dict(zip(sequences.keys[members].tolist(), found, strict=True)))
            values[same[members]] = sums
            bar.advance(len(batch.input_ids))
    return sequences.by_row(values[same]).to(device)


def _cached(cache: ReferenceCache, keys: Shaped[np.ndarray, " distinct"]) -> Float32[np.ndarray, " distinct"]:
    """What the cache knows of `keys`; NaN where it knows nothing."""
    values = np.full(len(keys), np.nan, dtype=np.float32)
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        part = keys[start : start + _KEYS_AT_ONCE].tolist()
        known = cache.get(part)
        values[start : start + len(part)] = [known[key][0] if key in known else np.nan for key in part]
    return values


@dataclass(frozen=True)
class _Sequences:
    """Every completion of every group behind its prompt: about 60 bytes each, while the pass runs.

    Attributes:
        keys: Content hashes, 16 bytes each.
        rows: Which group each is of.
        places: Which of the group's completions it is.
        lengths: Tokens of the completion.
        prompts: Content hash of each group's prompt.
        prompt_lengths: Tokens of each group's prompt.
    """

    keys: Shaped[np.ndarray, " sequences"]
    rows: Int64[np.ndarray, " sequences"]
    places: Int64[np.ndarray, " sequences"]
    lengths: Int64[np.ndarray, " sequences"]
    prompts: Shaped[np.ndarray, " rows"]
    prompt_lengths: Int64[np.ndarray, " rows"]

    @classmethod
    def of(cls, groups: Sequence[CompletionGroup]) -> "_Sequences":
        keys, prompts = bytearray(), bytearray()
        rows, places, lengths, prompt_lengths = array("q"), array("q"), array("q"), array("q")
        for row, group in enumerate(groups):
            prompts += blake2b(group.prompt_ids.tobytes(), digest_size=_KEY_BYTES).digest()
            prompt_lengths.append(len(group.prompt_ids))
            for k, completion in enumerate(group.completions):
                keys += group.sequence_key(k)
                rows.append(row)
                places.append(k)
                lengths.append(len(completion.ids))
        return cls(
            keys=np.frombuffer(keys, dtype=f"V{_KEY_BYTES}"),
            rows=np.array(rows, dtype=np.int64),
            places=np.array(places, dtype=np.int64),
            lengths=np.array(lengths, dtype=np.int64),
            prompts=np.frombuffer(prompts, dtype=f"V{_KEY_BYTES}"),
            prompt_lengths=np.array(prompt_lengths, dtype=np.int64),
        )

    def by_row(self, values: Float32[np.ndarray, " sequences"]) -> Float32[Tensor, "rows completions"]:
        """A value of each sequence, laid out by group and completion."""
        table = np.full((len(self.prompts), int(self.places.max()) + 1), np.nan, dtype=np.float32)
        table[self.rows, self.places] = values
        return torch.from_numpy(table)


@dataclass(frozen=True)
class _Jobs:
    """Sequences to score, those with the same prompt together: job j has sequences order[starts[j] : starts[j + 1]].

    Attributes:
        tokens: Of each job, the prompt once.
    """

    order: Int64[np.ndarray, " sequences"]
    starts: Int64[np.ndarray, " boundaries"]
    tokens: Int64[np.ndarray, " jobs"]

    @classmethod
    def of(cls, sequences: _Sequences, missing: Int64[np.ndarray, " missing"], budget: int) -> "_Jobs":
        _, prompt = np.unique(sequences.prompts[sequences.rows[missing]], return_inverse=True)
        order = missing[np.lexsort((missing, prompt))]
        prompt.sort()
        starts, tokens = array("q"), array("q")
        before = -1
        for at, (i, same) in enumerate(zip(order.tolist(), prompt.tolist(), strict=True)):
            length = int(sequences.lengths[i])
            if same != before or tokens[-1] + length > budget:
                starts.append(at)
                tokens.append(int(sequences.prompt_lengths[sequences.rows[i]]))
            tokens[-1] += length
            before = same
        return cls(order, np.array([*starts, len(order)]), np.array(tokens, dtype=np.int64))

    def members(self, job: int) -> Int64[np.ndarray, " sequences"]:
        """The sequences of one job."""
        return self.order[self.starts[job] : self.starts[job + 1]]


def _group(
    groups: Sequence[CompletionGroup], sequences: _Sequences, members: Int64[np.ndarray, " sequences"]
) -> CompletionGroup:
    """One prompt with the completions of `members`, which may come from several rows."""
    rows = {row: groups[row] for row in sequences.rows[members].tolist()}
    chosen = zip(sequences.rows[members].tolist(), sequences.places[members].tolist(), strict=True)
    completions = tuple(rows[row].completions[k] for row, k in chosen)
    first: CompletionGroup = next(iter(rows.values()))
    return replace(first, completions=completions)


def _not_finite(
    groups: Sequence[CompletionGroup], rows: Int64[np.ndarray, " sequences"], sums: Float64[np.ndarray, " sequences"]
) -> DataError:
    bad = int(np.flatnonzero(~np.isfinite(sums))[0])
    return DataError(
        "The reference model gives a completion no finite log-probability.",
        where=str(groups[int(rows[bad])].source),
        got=str(float(sums[bad])),
        expected="a finite number",
        todo="Check the model's weights for NaN, or use --dtype float32.",
    )
