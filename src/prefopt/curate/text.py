"""Text as words, and words as hashes of the runs they stand in: what near duplicates and leaks are found by."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt32, UInt64

__all__ = ["SHINGLE", "WordIds", "run_hashes", "shingles", "whole_hash", "words"]

# Runs of letters and digits; a character by itself in scripts that put no space between words; a sign before a
# number or a single letter, which makes another question of "5 + 3"; pictographs, which may be all that an answer says.
_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
    r"|[-+*/=<>^%](?=\s?(?:\d|[a-z]\b))|[\u2600-\u27bf\U0001f000-\U0001faff]"
)
_MOST_WORDS = 1_000_000  # remembered at a time: about 150 MB
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so no bit of an earlier word is lost
SHINGLE = 5


def words(text: str) -> list[str]:
    """Words of a text without case, punctuation, or how its characters were composed (NFKC)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


class WordIds:
    """64-bit hashes of words, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, some: Sequence[str]) -> UInt64[np.ndarray, " words"]:
        """A hash for each word, the same in every process."""
        known = self._known
        if len(known) > _MOST_WORDS:
            known.clear()
        for word in {word for word in some if word not in known}:
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter(map(known.__getitem__, some), np.uint64, len(some))


def run_hashes(ids: UInt64[np.ndarray, " words"], longest: int) -> list[UInt64[np.ndarray, " _"]]:
    """Of every n from 0 to `longest` the hashes of all runs of n words, in order; none where there are fewer words."""
    found = [np.zeros(0, np.uint64)]
    hashes = np.zeros(len(ids) + 1, np.uint64)
    for n in range(1, longest + 1):
        hashes = hashes[:-1] * _FACTOR + ids[n - 1 :] if n <= len(ids) else found[0]
        found.append(hashes)
    return found


def whole_hash(ids: UInt64[np.ndarray, " words"]) -> int:
    """The hash of all words as one run."""
    powers = np.full(len(ids), _FACTOR)
    powers[:1] = 1
    return int((ids * np.cumprod(powers)[::-1]).sum(dtype=np.uint64))


def shingles(text: str, runs: Sequence[UInt64[np.ndarray, " _"]]) -> UInt32[np.ndarray, " shingles"]:
    """The set of runs of 5 words, as sorted hashes; of a shorter text its only run, of one without words itself.

    Args:
        runs: `run_hashes` of the text, to 5 at least.
    """
    longest = next((hashes for hashes in runs[SHINGLE:0:-1] if len(hashes)), None)
    if longest is None:
        digest = hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=4).digest()
        return np.frombuffer(digest, np.uint32)
    return np.unique((longest >> np.uint64(32)).astype(np.uint32))
