"""Leaks: rows that hold a prompt of an evaluation set.

A prompt leaks where a turn of the row is that prompt, or where a run of 13 of its words stands anywhere in the row,
case and punctuation apart. Of a prompt of 8 to 12 words the run is the whole of it; shorter ones are too common to be
looked for within other text and have to be a whole turn. 13 and 8 are those of Brown et al. 2020, "Language Models
are Few-Shot Learners" (arXiv 2005.14165, appendix C).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt64

from prefopt.curate.text import WordIds, run_hashes, whole_hash, words
from prefopt.data.audit import Refusal
from prefopt.data.prompts import prompt_of
from prefopt.data.read import read_rows
from prefopt.data.row import Row
from prefopt.data.turns import kind_of
from prefopt.errors import DataError
from prefopt.records import Source

__all__ = ["LONGEST", "EvaluationPrompt", "EvaluationSet", "Leak", "read_evaluation"]

LONGEST, _SHORTEST = 13, 8
_QUESTIONS = ("question", "Question")  # TruthfulQA's

Ids = UInt64[np.ndarray, " _"]


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A prompt, or one user turn of a longer one, of a set that something is measured on."""

    source: Source
    text: str


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation prompt found in a row.

    Attributes:
        source: The row.
        part: Where in it: "prompt", or a completion's name.
        kind: "exact": a whole turn; "run": words of it.
        prompt: Whose.
        text: The words found.
    """

    source: Source
    part: str
    kind: Literal["exact", "run"]
    prompt: EvaluationPrompt
    text: str


def read_evaluation(sources: Sequence[str]) -> list[EvaluationPrompt]:
    """Every user turn of evaluation sets: MT-Bench's `turns`, a `question`, or the prompt of any layout that is read.

    Raises:
        DataError: a source cannot be read, or a row of it holds no prompt: what is not seen would count as clean.
    """
    found = []
    for source, raw in read_rows(sources):
        try:
            if raw.fault is not None:
                raise raw.fault
            texts = _prompt_texts(raw.values, source)
        except Refusal as refusal:
            raise DataError(
                "A row of the evaluation set has no prompt.",
                where=str(source),
                got=str(refusal),
                expected="turns, question, instruction, prompt or messages",
                todo="Mend or remove the row: leaks of what is not read would not be found.",
            ) from refusal
        found += [EvaluationPrompt(source, text) for text in texts]
    if not found:
        raise DataError("The evaluation sets hold no row.", where=", ".join(sources), got="0 rows")
    return found


def _prompt_texts(values: Any, source: Source) -> list[str]:
    if isinstance(values, dict) and isinstance(values.get("turns"), list):
        turns = values["turns"]
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise Refusal("wrong_type", "turns is not a list of texts")
        return list(turns)
    if isinstance(values, dict) and "prompt" not in values:
        question = next((values[name] for name in _QUESTIONS if values.get(name)), None)
        if question is not None:
            if not isinstance(question, str):
                raise Refusal("wrong_type", f"question is {kind_of(question)}, not text")
            return [question]
    content = prompt_of(Row(values), source).content
    texts = [content] if isinstance(content, str) else [m.content for m in content if m.role == "user"]
    if not any(text.strip() for text in texts):
        raise Refusal("empty_prompt", "no user turn says anything")
    return [text for text in texts if text.strip()]


class EvaluationSet:
    """Evaluation prompts by their words; of what several share, the first has it."""

    def __init__(self, prompts: Sequence[EvaluationPrompt], ids: WordIds) -> None:
        self.prompts = prompts
        self._words = [words(prompt.text) for prompt in prompts]
        self._whole: dict[int, int] = {}  # hash of all words -> number of the prompt
        found: dict[int, dict[int, tuple[int, int]]] = {}  # run length -> hash -> number of the prompt, first word
        for number, some in enumerate(self._words):
            if not some:
                continue  # punctuation alone: no words to look for
            mine = ids.of(some)
            self._whole.setdefault(whole_hash(mine), number)
            length = min(len(some), LONGEST)
            if length >= _SHORTEST:
                runs = found.setdefault(length, {})
                for start, run in enumerate(run_hashes(mine, length)[length].tolist()):
                    runs.setdefault(run, (number, start))
        self._runs = {length: (np.array(sorted(runs), np.uint64), runs) for length, runs in found.items()}

    def leaks(self, source: Source, prompt: Sequence[Ids], parts: Sequence[tuple[str, Sequence[Ids]]]) -> list[Leak]:
        """Evaluation prompts found in a row, each once.

        Args:
            prompt: Words of each turn.
            parts: Of each turn ("prompt") and each completion (its name) `run_hashes` to LONGEST.
        """
        found: dict[int, Leak] = {}
        for turn in prompt:
            number = self._whole.get(whole_hash(turn)) if len(turn) else None
            if number is not None:
                found[number] = Leak(source, "prompt", "exact", self.prompts[number], " ".join(self._words[number]))
        for part, hashes in parts:
            for number, text in self._runs_in(hashes):
                found.setdefault(number, Leak(source, part, "run", self.prompts[number], text))
        return list(found.values())

    def _runs_in(self, hashes: Sequence[Ids]) -> Iterator[tuple[int, str]]:
        """Numbers of the prompts of which a run stands in a text, with its words."""
        for length, (keys, runs) in self._runs.items():
            mine = hashes[length]
            there = keys[np.minimum(np.searchsorted(keys, mine), len(keys) - 1)] == mine
            for run in mine[there].tolist():
                number, start = runs[run]
                yield number, " ".join(self._words[number][start : start + length])
