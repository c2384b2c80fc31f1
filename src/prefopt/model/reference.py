"""Reference log-probabilities: computed once, kept in a content-addressed cache.

The key of an entry is (what scored: hash of weights and adapter, dtype) and (what was scored: hash
of prompt, completion and mask tokens). Another beta, loss, subset, order, seed or epoch count asks
for the same keys and finds them. One SQLite file under the user's cache folder holds all of it;
entries are committed a micro-batch at a time, so a killed pass goes on where it stopped.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import platformdirs
import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, micro_batches, pack
from prefopt.errors import DataError
from prefopt.progress import progress, say

__all__ = ["ReferenceCache", "cache_folder", "reference_logprobs"]


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
        with self._connect() as db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS logprobs (model TEXT, sequence BLOB, logprob_sum REAL NOT NULL,"
                " tokens INTEGER NOT NULL, PRIMARY KEY (model, sequence)) WITHOUT ROWID"
            )

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                with db:
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
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                rows = db.execute(
                    "SELECT sequence, logprob_sum, tokens FROM logprobs WHERE model = ? AND sequence IN "
                    f"({', '.join('?' * len(part))})",
                    (self.model_key, *part),
                )
                found |= {key: (value, tokens) for key, value, tokens in rows}
        return found

    def put(self, entries: dict[bytes, tuple[float, int]]) -> None:
        """Commit entries; the same key written twice keeps the later value."""
        with self._connect() as db:
            db.executemany(
                "INSERT OR REPLACE INTO logprobs VALUES (?, ?, ?, ?)",
                [(self.model_key, key, value, tokens) for key, (value, tokens) in entries.items()],
            )


def reference_logprobs(
    groups: Sequence[CompletionGroup],
    cache: ReferenceCache,
    scorer: Callable[[], Callable[[PackedBatch], Float[Tensor, " sequences"]]],
    *,
    tokens_per_batch: int,
) -> dict[bytes, float]:
    """Log-probability sums of every completion under the reference, by sequence key.

    Args:
        scorer: Makes the function that scores a batch; called only if something is missing, so a
            reference whose values are all cached is never loaded.
        tokens_per_batch: Budget of a forward pass; groups are taken longest first.

    Raises:
        DataError: the reference gives NaN or infinity; names the row.
    """
    keys = {key for group in groups for key in _keys(group)}
    known = cache.get(sorted(keys))
    missing = [group for group in groups if any(key not in known for key in _keys(group))]
    if not missing:
        say(f"reference log-probabilities: all {len(keys):,} sequences found in the cache ({cache.path})")
        return {key: value for key, (value, _) in known.items()}
    score = scorer()
    say(f"reference log-probabilities: {len(keys) - len(known):,} of {len(keys):,} sequences to score")
    with progress("reference", total=len(missing), unit="rows") as bar, torch.no_grad():
        for batch_groups in micro_batches(missing, tokens_per_batch):
            batch = pack(batch_groups)
            entries = _entries(batch, score(batch))
            cache.put(entries)
            known |= entries
            bar.advance(len(batch_groups))
    return {key: value for key, (value, _) in known.items()}


def _keys(group: CompletionGroup) -> list[bytes]:
    return [group.sequence_key(k) for k in range(len(group.completions))]


def _entries(batch: PackedBatch, sums: Float[Tensor, " sequences"]) -> dict[bytes, tuple[float, int]]:
    keys = [key for group in batch.groups for key in _keys(group)]
    rows = [group.source for group in batch.groups for _ in group.completions]
    values = sums.double().tolist()
    for value, row in zip(values, rows, strict=True):
        if not torch.isfinite(torch.tensor(value)):
            raise DataError(
                "The reference model gives a completion no finite log-probability.",
                where=str(row),
                got=str(value),
                expected="a finite number",
                todo="Check the model's weights for NaN, or use --dtype float32.",
            )
    return dict(zip(keys, zip(values, batch.token_counts.tolist(), strict=True), strict=True))
