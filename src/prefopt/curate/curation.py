"""What is found in usable rows beside what reading them told: gathered row by row, then said as JSON."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from prefopt.curate.columns import Columns, Conflict
from prefopt.curate.example import Example
from prefopt.curate.leakage import LONGEST, EvaluationPrompt, EvaluationSet, Leak
from prefopt.curate.lengths import LengthGap, length_gap
from prefopt.curate.near import THRESHOLD, Near, NearIndex
from prefopt.curate.oddities import oddities, script
from prefopt.curate.refusals import refusal
from prefopt.curate.text import SHINGLE, WordIds, run_hashes, shingles, words
from prefopt.records import Source

__all__ = ["Count", "Curation", "NearRow"]


@dataclass(slots=True)
class Count:
    """In how many rows something is, and the first of them."""

    rows: int
    first: Source
    detail: str = ""


@dataclass(frozen=True, slots=True)
class NearRow:
    """A row near an earlier one."""

    source: Source
    of: Source
    similarity: float


class _Lengths:
    """Of every pair of completions that rows compare, the better one first."""

    def __init__(self) -> None:
        self.better, self.worse, self.prompts = array("q"), array("q"), array("q")
        self._numbers: dict[bytes, int] = {}

    def add(self, prompt_key: bytes, lengths: Sequence[int]) -> None:
        number = self._numbers.setdefault(prompt_key, len(self._numbers))
        for better, worse in combinations(lengths, 2):
            self.better.append(better)
            self.worse.append(worse)
            self.prompts.append(number)


class Curation:
    """Takes usable rows one at a time; about 600 bytes a row stay in memory.

    Args:
        against: Prompts of evaluation sets; None: no leak is looked for.
        unit: What completion lengths are given in; words are counted here.
    """

    def __init__(self, against: Sequence[EvaluationPrompt] | None, unit: str = "words") -> None:
        self._ids = WordIds()
        self._evaluation = None if against is None else EvaluationSet(against, self._ids)
        self._unit = unit
        self._near = NearIndex()
        self._sources: list[Source] = []
        self._lengths = _Lengths()
        self.columns = Columns()
        self.leaks: list[Leak] = []
        self.completions: Counter[str] = Counter()
        self.refusals: dict[str, Count] = {}
        self.oddities: dict[str, dict[str, Count]] = {}
        self.scripts: dict[str, Counter[str]] = {}
        self.other_script: Count | None = None

    @property
    def rows(self) -> int:
        """Rows looked at."""
        return len(self._sources)

    def add(self, example: Example, values: Any, lengths: Sequence[int] | None = None) -> None:
        """Look at one row.

        Args:
            values: The row as it stands in its file.
            lengths: Of its completions, where they are not counted in words.
        """
        self._sources.append(example.source)
        self.columns.add(example.source, values)
        turns = [self._ids.of(words(turn)) for turn in example.prompt]
        said = {name: self._ids.of(words(text)) for name, text in example.completions.items()}
        longest = SHINGLE if self._evaluation is None else LONGEST
        asked = [run_hashes(ids, longest) for ids in turns]
        runs = {name: run_hashes(ids, longest) for name, ids in said.items()}
        whole = asked[0] if len(asked) == 1 else run_hashes(np.concatenate(turns or [np.zeros(0, np.uint64)]), SHINGLE)
        parts = [shingles(example.completions[name], hashes) for name, hashes in runs.items()]
        self._near.add(example.kind, shingles("\n".join(example.prompt), whole), parts)
        if self._evaluation is not None:
            everywhere = [*(("prompt", hashes) for hashes in asked), *runs.items()]
            self.leaks += self._evaluation.leaks(example.source, turns, everywhere)
        if example.kind in ("pair", "ranking"):
            self._lengths.add(example.prompt_key, lengths or [len(ids) for ids in said.values()])
        self._look(example)

    def _look(self, example: Example) -> None:
        """Refusals, oddities and scripts."""
        ranked = example.kind == "ranking"
        scripts = {}
        for name, text in (("prompt", "\n".join(example.prompt)), *example.completions.items()):
            part = "completion" if ranked and name != "prompt" else name
            for oddity in oddities(text):
                _count(self.oddities.setdefault(oddity, {}), part, example.source)
            scripts[name] = script(text)
            if scripts[name]:
                self.scripts.setdefault(part, Counter())[scripts[name]] += 1
            if name != "prompt":
                self.completions[part] += 1
                if wording := refusal(text):
                    _count(self.refusals, part, example.source, wording)
        asked, *answered = scripts.values()
        other = next((s for s in answered if asked and s and s != asked), None)
        if other is not None:
            found = self.other_script = self.other_script or Count(0, example.source, f"{other} after {asked}")
            found.rows += 1

    @cached_property
    def _found(self) -> list[Near]:
        return list(self._near.found())

    def _near_rows(self, opposite: bool) -> list[NearRow]:
        there = self._sources
        return [NearRow(there[n.place], there[n.of], n.similarity) for n in self._found if n.opposite == opposite]

    @cached_property
    def duplicates(self) -> list[NearRow]:
        """Rows that nearly repeat an earlier one."""
        return self._near_rows(opposite=False)

    @cached_property
    def contradictions(self) -> list[NearRow]:
        """Rows that prefer nearly what an earlier one rejects."""
        return self._near_rows(opposite=True)

    @cached_property
    def conflicts(self) -> list[Conflict]:
        """Scores that contradict the critique beside them."""
        return list(self.columns.conflicts())

    @cached_property
    def lengths(self) -> LengthGap | None:
        """How lengths compare; None where rows compare nothing."""
        some = self._lengths
        return length_gap(some.better, some.worse, some.prompts, self._unit) if some.better else None

    @property
    def gaps(self) -> Sequence[int]:
        """Length of the better minus that of the worse completion of every pair."""
        return [b - w for b, w in zip(self._lengths.better, self._lengths.worse, strict=True)]

    @property
    def evaluation_prompts(self) -> int | None:
        """How many leaks were looked for of; None: none were."""
        return None if self._evaluation is None else len(self._evaluation.prompts)

    def dropped(self) -> dict[Source, dict[str, Any]]:
        """Usable rows to leave out, each with its reason: near duplicates, and rows with a leak."""
        found: dict[Source, dict[str, Any]] = {}
        for near in self.duplicates:
            found[near.source] = {"reason": "near_duplicate", "of": str(near.of), "similarity": near.similarity}
        for leak in self.leaks:  # what may not be trained on at all says more than what is there twice
            if found.get(leak.source, {}).get("reason") != "leak":
                found[leak.source] = {"reason": "leak", "evaluation": str(leak.prompt.source), "text": leak.text}
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything found, every row of near duplicates, leaks and conflicts named."""
        columns = self.columns
        return {
            "rows": self.rows,
            "near_duplicates": {"threshold": THRESHOLD, **_listed(self.duplicates)},
            "near_contradictions": {"threshold": THRESHOLD, **_listed(self.contradictions)},
            "leaks": self._leaks_as_json(),
            "lengths": None if self.lengths is None else asdict(self.lengths),
            "refusals": {
                part: {"of": self.completions[part], "share": count.rows / self.completions[part], **_counted(count)}
                for part, count in self.refusals.items()
            },
            "oddities": {o: {part: _counted(c) for part, c in parts.items()} for o, parts in self.oddities.items()},
            "scripts": {part: dict(counts.most_common()) for part, counts in self.scripts.items()},
            "other_script": None if self.other_script is None else _counted(self.other_script),
            "origins": columns.origins,
            "scores": {name: asdict(scores) for name, scores in columns.scores.items()},
            "score_order": dict(columns.order),
            "score_below": [_place(source) for source in columns.reversed],
            "score_critique_conflicts": {
                "critiques": columns.critiques,
                "rows": len({c.source for c in self.conflicts}),
                "found": [{**asdict(c), "source": _place(c.source)} for c in self.conflicts],
            },
        }

    def _leaks_as_json(self) -> dict[str, Any] | None:
        if self.evaluation_prompts is None:
            return None
        found = [
            {
                **_place(leak.source),
                "part": leak.part,
                "kind": leak.kind,
                "text": leak.text,
                "evaluation": _place(leak.prompt.source),
            }
            for leak in self.leaks
        ]
        rows = len({leak.source for leak in self.leaks})
        return {"evaluation_prompts": self.evaluation_prompts, "rows": rows, "found": found}


def _count(counts: dict[str, Count], name: str, source: Source, detail: str = "") -> None:
    counts.setdefault(name, Count(0, source, detail)).rows += 1


def _counted(count: Count) -> dict[str, Any]:
    return {"rows": count.rows, "first": _place(count.first), **({"detail": count.detail} if count.detail else {})}


def _listed(rows: Sequence[NearRow]) -> dict[str, Any]:
    found = [{**_place(n.source), "of": _place(n.of), "similarity": round(n.similarity, 4)} for n in rows]
    return {"rows": len(rows), "found": found}


def _place(source: Source) -> Mapping[str, Any]:
    return {"file": source.file, "row": source.row, "line": source.line}
