"""Near duplicates: rows whose prompt and completions are nearly those of an earlier row.

Two texts are near where the Jaccard index of their sets of runs of 5 words is at least 0.8, as in Lee et al. 2022,
"Deduplicating Training Data Makes Language Models Better" (arXiv 2107.06499, section 4.2). Of two rows the prompts
have to be near and each completion its counterpart: many pairs of one long dialogue are no duplicates.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash
from jaxtyping import UInt32, UInt64

from prefopt.data.scratch import Scratch

__all__ = ["THRESHOLD", "Near", "NearIndex", "jaccard"]

THRESHOLD = 0.8
# A band agrees where 4 minima of the prompt and 4 of the completions do. Two rows with index s in both share one of 20
# bands with probability 1 - (1 - s^8)^20: 0.97 at 0.8, 0.9999 at 0.9.
_BANDS, _ROWS = 20, 4
_PIECE = 2**14  # runs hashed together, 80 times 4 bytes each
_OPPOSITE = ({"good", "bad"},)

Shingles = UInt32[np.ndarray, " _"]


@dataclass(frozen=True, slots=True)
class Near:
    """A row that nearly says what an earlier one says, or the opposite.

    Attributes:
        place, of: Its number and the earlier row's, in the order in which they were added.
        similarity: The smallest Jaccard index of their prompts and completions.
        opposite: What one prefers the other rejects.
    """

    place: int
    of: int
    similarity: float
    opposite: bool


class NearIndex:
    """Rows by what they are near to; 160 bytes a row stay in memory, the sets are on disk."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._starts: list[int] = []
        self._kinds: list[str] = []
        self._keys: list[UInt64[np.ndarray, " bands"]] = []
        self._minhash = MinHash(num_perm=_BANDS * _ROWS, hashfunc=int)
        self._mix = np.random.default_rng(0).integers(0, 2**63, 2 * _ROWS, dtype=np.uint64) * 2 + 1

    def add(self, kind: str, prompt: Shingles, completions: Sequence[Shingles]) -> None:
        """Add a row.

        Args:
            kind: "pair", "good", "bad", ...; only rows of a kind are compared, and good with bad.
            prompt: Of all its turns.
            completions: In the row's order.
        """
        sizes = np.array([len(completions), len(prompt), *map(len, completions)], np.uint32)
        self._starts.append(self._scratch.append(b"".join(a.tobytes() for a in (sizes, prompt, *completions))))
        self._kinds.append(kind)
        said = np.concatenate(completions) if completions else np.zeros(0, np.uint32)
        minima = [self._minima(part).reshape(_BANDS, _ROWS) for part in (prompt, said)]
        self._keys.append((np.hstack(minima).astype(np.uint64) * self._mix).sum(axis=1, dtype=np.uint64))

    def _minima(self, part: Shingles) -> UInt32[np.ndarray, " minima"]:
        self._minhash.clear()
        for start in range(0, len(part), _PIECE):
            self._minhash.update_batch(part[start : start + _PIECE].tolist())
        minima: UInt32[np.ndarray, " minima"] = self._minhash.hashvalues
        return minima

    def found(self) -> Iterator[Near]:
        """Rows near an earlier one, in order; a near duplicate is not itself compared with later rows."""
        self._scratch.flush()
        keys = np.stack(self._keys) if self._keys else np.zeros((0, _BANDS), np.uint64)
        buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, bands in _shared(keys):
            mine = [buckets[band, int(keys[place, band])] for band in bands]
            near = self._nearest(place, sorted({earlier for bucket in mine for earlier in bucket}))
            if near is not None:
                yield near
            if near is None or near.opposite:
                for bucket in mine:
                    bucket.append(place)

    def _nearest(self, place: int, candidates: Sequence[int]) -> Near | None:
        """The first duplicate among earlier rows; the first opposite one if there is none."""
        prompt, completions = self._read(place) if candidates else (np.zeros(0, np.uint32), [])
        opposite = None
        for earlier in candidates:
            one, other = self._kinds[place], self._kinds[earlier]
            if one != other and {one, other} not in _OPPOSITE:
                continue
            there, theirs = self._read(earlier)
            similarity = jaccard(prompt, there)
            if similarity < THRESHOLD or len(theirs) != len(completions):
                continue
            same = min([similarity, *map(jaccard, completions, theirs)])
            crossed = min([similarity, *map(jaccard, completions, reversed(theirs))]) if one == "pair" else 0.0
            if max(same, crossed) < THRESHOLD:
                continue
            near = Near(place, earlier, max(same, crossed), one != other or crossed > same)
            if not near.opposite:
                return near
            opposite = opposite or near
        return opposite

    def _read(self, place: int) -> tuple[Shingles, list[Shingles]]:
        start = self._starts[place]
        end = self._starts[place + 1] if place + 1 < len(self._starts) else self._scratch.size
        data = np.frombuffer(self._scratch.read(start, end - start), np.uint32)
        count = int(data[0])
        prompt, *completions = np.split(data[2 + count :], np.cumsum(data[1 : 1 + count]))
        return prompt, completions


def _shared(keys: UInt64[np.ndarray, "rows bands"]) -> Iterator[tuple[int, list[int]]]:
    """Rows that share a band's key with another row, in order, and the bands."""
    shared = np.zeros(keys.shape, bool)
    for band in range(keys.shape[1]):
        _, inverse, counts = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        shared[:, band] = counts[inverse] > 1
    for place in np.flatnonzero(shared.any(axis=1)):
        yield int(place), np.flatnonzero(shared[place]).tolist()


def jaccard(a: Shingles, b: Shingles) -> float:
    """|A and B| / |A or B| of two sets, each sorted and without repetition; 1 of two empty ones."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - both
    return both / either if either else 1.0
