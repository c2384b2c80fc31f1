"""What other columns of a preference file say: where rows come from, how they were scored, and whether that agrees.

Columns are known by name; "chosen-rating", "chosen_rating" and "rating_chosen" are one.
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.data.turns import clean
from prefopt.records import Source

__all__ = ["Columns", "Conflict", "Scores", "tone"]

_ORIGIN = re.compile(
    r"(?:(?:chosen|rejected)_)?(?:source|dataset|subset|category|task|domain|language|models?|generator|annotator|judge)"
    r"(?:_(?:chosen|rejected))?"
)
_SCORE = re.compile(
    r"(?:(?P<before>chosen|rejected)_)?(?:(?:avg|mean|overall|fine_grained)_)?(?:scores?|ratings?|rewards?)"
    r"(?:_(?P<after>chosen|rejected))?"
)
_CRITIQUE = re.compile(
    r"(?:(?P<before>chosen|rejected)_)?(?:critique|feedback|rationale)(?:_(?P<after>chosen|rejected))?"
)
_MOST_VALUES = 1000  # different values counted in a column; more of them are no origin but a text or an id

_MOST = 1e100  # no score is larger; squares of what is less are finite

_BLAME = re.compile(
    r"\b(?:incorrect|inaccurate|irrelevant|unhelpful|misleading|nonsens\w+|fail(?:s|ed) to|does(?: not|n't)"
    r" (?:follow|answer|address)|completely wrong|major (?:errors?|issues?|problems?)|poor(?:ly)?)\b",
    re.IGNORECASE,
)
_PRAISE = re.compile(
    r"\b(?:excellent|outstanding|perfect(?:ly)?|great|well[- ](?:done|written|structured)|accurate(?:ly)?|helpful"
    r"|clear(?:ly)?|comprehensive|thorough|insightful|good)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Scores:
    """A column of numbers.

    Attributes:
        rows: Numbers in it; a list counts each.
        odd: Entries that are no number.
        quartiles: Minimum, lower quartile, median, upper quartile, maximum.
    """

    rows: int
    odd: int
    mean: float
    sd: float
    quartiles: tuple[float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Conflict:
    """A score and the critique beside it that say opposite things."""

    source: Source
    side: str  # "chosen", "rejected" or ""
    score: float
    tone: int  # -1: the critique blames, 1: it praises


class Columns:
    """Gathers the columns of rows; 8 bytes a number stay in memory."""

    def __init__(self) -> None:
        self._origins: dict[str, Counter[str]] = {}
        self._many: set[str] = set()
        self.numbers: dict[str, array[float]] = {}
        self._odd: Counter[str] = Counter()
        self.order: Counter[str] = Counter()
        self.reversed: list[Source] = []
        self._toned: dict[str, list[tuple[Source, float, int]]] = {}
        self._lowest, self._highest = math.inf, -math.inf  # scores beside a critique

    def add(self, source: Source, values: Any) -> None:
        """Look at a row as it stands in its file."""
        if not isinstance(values, dict):
            return
        scores: dict[str, float] = {}
        critiques: dict[str, str] = {}
        for key, value in values.items():
            column = clean(str(key), [])
            name = column.lower().replace("-", "_").replace(" ", "_")
            if value is None:
                continue
            if (match := _SCORE.fullmatch(name)) is not None:
                number = self._score(column, value)
                if number is not None:
                    scores.setdefault(_side(match), number)
            elif (match := _CRITIQUE.fullmatch(name)) is not None and isinstance(value, str):
                critiques.setdefault(_side(match), value)
            elif _ORIGIN.fullmatch(name):
                self._origin(column, value)
        self._compare(source, scores, critiques)

    def _origin(self, column: str, value: Any) -> None:
        if column in self._many:
            return
        counts = self._origins.setdefault(column, Counter())
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str | int):
                counts[clean(str(one), [])] += 1
        if len(counts) > _MOST_VALUES:
            self._many.add(column)
            del self._origins[column]

    def _score(self, column: str, value: Any) -> float | None:
        """The column's number; None of a list or of what is none."""
        found = self.numbers.setdefault(column, array("d"))
        if isinstance(value, list):
            numbers = [_number(one) for one in value]
            found.extend(n for n in numbers if n is not None)
            self._odd[column] += numbers.count(None)
            return None
        number = _number(value)
        if number is None:
            self._odd[column] += 1
        else:
            found.append(number)
        return number

    def _compare(self, source: Source, scores: Mapping[str, float], critiques: Mapping[str, str]) -> None:
        if "chosen" in scores and "rejected" in scores:
            chosen, rejected = scores["chosen"], scores["rejected"]
            self.order["higher" if chosen > rejected else "equal" if chosen == rejected else "lower"] += 1
            if chosen < rejected:
                self.reversed.append(source)
        for side in scores.keys() & critiques.keys():
            self._lowest, self._highest = min(self._lowest, scores[side]), max(self._highest, scores[side])
            if said := tone(critiques[side]):
                self._toned.setdefault(side, []).append((source, scores[side], said))

    @property
    def origins(self) -> dict[str, dict[str, int]]:
        """Rows of every value, the most frequent first, of columns that say where rows come from."""
        return {column: dict(counts.most_common()) for column, counts in self._origins.items() if counts}

    @property
    def scores(self) -> dict[str, Scores]:
        """Every column of numbers."""
        found = {}
        for column, some in self.numbers.items():
            if some:
                values = np.asarray(some)
                low, first, median, third, high = map(float, np.percentile(values, [0, 25, 50, 75, 100]))
                spread = (low, first, median, third, high)
                found[column] = Scores(len(some), self._odd[column], float(values.mean()), float(values.std()), spread)
        return found

    @property
    def critiques(self) -> int:
        """Critiques that blame or praise, beside a score."""
        return sum(map(len, self._toned.values()))

    def conflicts(self) -> Iterator[Conflict]:
        """Scores in the highest fifth of their range beside a critique that only blames; in the lowest, only praises.

        The range is that of all scores that have a critique beside them.
        """
        fifth = (self._highest - self._lowest) / 5
        for side, rows in self._toned.items() if fifth > 0 else ():
            for source, score, said in rows:
                if said < 0 and score >= self._highest - fifth or said > 0 and score <= self._lowest + fifth:
                    yield Conflict(source, side, score, said)


def tone(critique: str) -> int:
    """-1: at least two different words of blame and none of praise; 1: the other way round; else 0."""
    blame = {found.group().lower() for found in _BLAME.finditer(critique)}
    praise = {found.group().lower() for found in _PRAISE.finditer(critique)}
    if len(blame) >= 2 and not praise:
        return -1
    return 1 if len(praise) >= 2 and not blame else 0


def _side(match: re.Match[str]) -> str:
    return match["before"] or match["after"] or ""


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < _MOST else None  # NaN is not less than anything
