"""Rows of any known layout -> records. The layout is recognised row by row.

Preference pairs have `chosen` and `rejected`, unpaired rows a `label`, all others are
demonstrations. Content is text or a conversation; where one side of a row is a conversation, so is
the other. Null counts as absent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.audit import Refusal
from prefopt.data.row import Row
from prefopt.data.turns import (
    check_order,
    clean,
    common_history,
    is_transcript,
    kind_of,
    shared_beginning,
    transcript_turns,
    transcripts,
)
from prefopt.records import Comparison, Content, Demonstration, Message, Ranking, Rating, Record, Source

__all__ = ["COLUMNS", "RECOGNISED", "Parsed", "alpaca_prompt", "pair_sides", "parse_row", "transcript_prompt"]

# Our names, which a column mapping may give to other columns.
COLUMNS = (
    *("prompt", "chosen", "rejected", "completion", "completions", "scores", "text", "messages"),
    *("label", "weight", "probability", "margin", "system"),
    *("finish", "chosen_finish", "rejected_finish"),
)
RECOGNISED = frozenset((*COLUMNS, "conversations", "instruction", "input", "output", "history"))

# Columns that hold the prompt in other people's files. Taking the common beginning of chosen and
# rejected for the prompt would silently drop them.
_MAYBE_PROMPTS = ("question", "query", "input", "instruction", "context", "user", "problem")

_EXPECTED = "expected chosen and rejected, prompt and completion, messages, instruction and output, or text"


@dataclass(frozen=True, slots=True)
class Parsed:
    """A row as a record, or why it is refused.

    `layout` is None where it was not recognised; `mends` are the reasons for which text was changed,
    `used` the columns that were looked into.
    """

    layout: str | None
    record: Record | None
    refusal: Refusal | None
    mends: tuple[str, ...]
    used: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sides:
    """A prompt and its completions, all text or all conversations."""

    prompt: Content
    completions: tuple[Content, ...]


def parse_row(values: Any, source: Source) -> Parsed:
    """A record from one row, given under our column names."""
    row = Row(values)
    record = refusal = None
    try:
        if not row.is_object:
            raise Refusal("wrong_type", f"the row is {kind_of(values)}, not an object with columns")
        record = _record(row, source)
    except Refusal as error:
        refusal = error
    return Parsed(row.layout, record, refusal, tuple(dict.fromkeys(row.mends)), tuple(row.used))


def _record(row: Row, source: Source) -> Record:
    two_outputs = "instruction" in row and "output" in row and isinstance(row["output"], list)
    if "chosen" in row or "rejected" in row or two_outputs:
        sides = _two_outputs(row) if two_outputs and "chosen" not in row else pair_sides(row)
        sides = _with_system(row, sides)
        _check(sides)
        told = (row.weight, row.probability, row.margin)
        cut = row.cut("chosen_finish", "rejected_finish")
        return Comparison(sides.prompt, sides.completions[0], sides.completions[1], source, *told, cut)
    if "completions" in row:
        sides = _with_system(row, _ranked(row))
        _check(sides)
        return Ranking(sides.prompt, sides.completions, source, row.weight)
    rated = "label" in row and any(name in row for name in ("completion", "messages", "conversations", "output"))
    sides = _with_system(row, _single(row, rated))
    _check(sides, ends=rated)
    cut = row.cut("finish")
    if rated:
        return Rating(sides.prompt, sides.completions[0], row.label, source, row.weight, row.probability, cut)
    return Demonstration(sides.prompt, sides.completions[0], source, row.weight, cut)


def pair_sides(row: Row) -> _Sides:
    """Prompt, chosen and rejected of a row that has the latter two."""
    row.layout = "preference pairs"
    row.require("chosen", "rejected")
    both = [row.content(row[name], name) for name in ("chosen", "rejected")]
    if "prompt" in row and row["prompt"] not in ("", []):
        return _explicit(row, row.content(row["prompt"], "prompt"), both, "preference pairs", "chosen, rejected")
    for name in ("conversations", "messages"):
        if name in row:
            history = row.turns(name)
            row.layout = f"preference pairs ({name} with chosen and rejected)"
            if history and history[-1].role == "assistant" and all(_is_whole(side) for side in both):
                return _implicit(row, both)  # a copy of the whole conversation
            return _answers(history, both)
    if "instruction" in row:
        row.layout = "preference pairs (alpaca columns with chosen and rejected)"
        return _answers(alpaca_prompt(row), both)
    if "prompt" in row and not any(isinstance(s, str) and is_transcript(s) or _is_whole(s) for s in both):
        return _explicit(row, row.content(row["prompt"], "prompt"), both, "preference pairs", "chosen, rejected")
    return _implicit(row, both)


def _ranked(row: Row) -> _Sides:
    """Prompt and completions, the best first: as they stand, or by their scores."""
    row.layout = "rankings"
    row.require("prompt")
    values, scores = row["completions"], row.get("scores", None)
    if not isinstance(values, list) or len(values) < 2:
        raise Refusal("wrong_type", "completions is not a list of two or more")
    contents = [row.content(value, f"completions[{i}]") for i, value in enumerate(values)]
    names = "completions, the best first"
    if scores is not None:
        names = "completions with scores"
        numbers = isinstance(scores, list) and all(type(s) in (int, float) and math.isfinite(s) for s in scores)
        if not numbers or len(scores) != len(contents):
            raise Refusal("wrong_type", f"scores is not a list of {len(contents)} numbers")
        if len(set(scores)) < len(scores):
            raise Refusal("tied_scores", "two completions have the same score, so neither is the better")
        contents = [contents[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])]
    return _explicit(row, row.content(row["prompt"], "prompt"), contents, "rankings", names)


def _implicit(row: Row, both: Sequence[Content]) -> _Sides:
    """The prompt is what two whole conversations or texts begin with."""
    chosen, rejected = both
    name = "preference pairs with an implicit prompt"
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        row.layout = f"{name} (message lists)"
        if not (chosen and rejected):
            raise Refusal("empty_completion", "chosen or rejected has no message")
        prompt, *rests = common_history(chosen, rejected)
        return _Sides(prompt, tuple(rests))
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise Refusal("wrong_type", "one of chosen and rejected is text, the other messages, and there is no prompt")
    if is_transcript(chosen) or is_transcript(rejected):
        row.layout = f"{name} (transcripts with Human:/Assistant: turns)"
        if not (is_transcript(chosen) and is_transcript(rejected)):
            raise Refusal("prompts_differ", "one of chosen and rejected is a transcript, the other is not")
        turns, *replies = transcripts(chosen, rejected)
        return _Sides(turns, tuple(replies))
    row.layout = f"{name} (the beginning that two texts share)"
    if maybe := [n for n in _MAYBE_PROMPTS if n in row]:
        raise Refusal("missing_columns", f"no prompt; if it is {maybe[0]!r}, say so: --columns prompt={maybe[0]}")
    start = "" if chosen == rejected else shared_beginning(chosen, rejected)
    return _Sides(start, (chosen[len(start) :], rejected[len(start) :]))


def _explicit(row: Row, prompt: Content, completions: Sequence[Content], kind: str, names: str) -> _Sides:
    """A prompt column; completions may be text, messages, or whole conversations that begin with it."""
    if isinstance(prompt, str) and all(isinstance(c, str) for c in completions):
        row.layout = f"{kind} of text (prompt, {names})"
        texts = [c for c in completions if isinstance(c, str)]
        turns = transcript_prompt(prompt) if is_transcript(prompt) else None
        if turns is None:
            return _Sides(prompt, tuple(texts))
        row.layout = f"{kind} (prompt with Human:/Assistant: turns, {names})"
        if all(t.startswith(prompt) for t in texts):
            texts = [t[len(prompt) :] for t in texts]
        replies = [t.removeprefix("\n\nAssistant:").removeprefix(" ") for t in texts]
        return _Sides(turns, tuple((Message("assistant", r),) for r in replies))
    row.layout = f"{kind} of messages (prompt, {names})"
    if not all(_is_whole(c) for c in completions):
        return _answers((Message("user", prompt),) if isinstance(prompt, str) else prompt, completions)
    row.layout = f"{kind} ({names} as whole message lists that begin with the prompt)"
    whole = [c for c in completions if isinstance(c, tuple)]
    if isinstance(prompt, tuple):
        if any(c[: len(prompt)] != prompt for c in whole):
            raise Refusal("prompts_differ", "a message list does not begin with the prompt's messages")
        return _Sides(prompt, tuple(c[len(prompt) :] for c in whole))
    if any(all(m.role != "user" or m.content.strip() != prompt.strip() for m in c) for c in whole):
        raise Refusal("prompts_differ", "the prompt column is no user turn of the message lists")
    if len(whole) == 1:
        return _from_first_reply(whole[0])
    if len(whole) > 2:
        raise Refusal("wrong_type", "whole message lists under a prompt of text; give the prompt as messages, too")
    start, *rests = common_history(whole[0], whole[1])
    return _Sides(start, tuple(rests))


def _is_whole(content: Content) -> bool:
    """Whether these messages bring their own prompt along."""
    return isinstance(content, tuple) and len(content) > 0 and content[0].role in ("user", "system")


def transcript_prompt(text: str) -> tuple[Message, ...] | None:
    """Turns of a transcript that waits for a reply; None where the reply has begun."""
    turns = transcript_turns(text)
    if turns[-1].role == "assistant":
        return None if turns[-1].content.strip() else turns[:-1]
    return turns


def _answers(history: tuple[Message, ...], completions: Sequence[Content]) -> _Sides:
    """A conversation and the assistant's answers to it."""
    return _Sides(history, tuple((Message("assistant", c),) if isinstance(c, str) else c for c in completions))


def alpaca_prompt(row: Row) -> tuple[Message, ...]:
    """`history`, then `instruction` and `input` (joined by a line break) as the user's turn."""
    turns: list[Message] = []
    history = row.get("history", [])
    if not isinstance(history, list):
        raise Refusal("wrong_type", f"history is {kind_of(history)}, not a list")
    for i, exchange in enumerate(history):
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(t, str) for t in exchange)):
            raise Refusal("wrong_type", f"history[{i}] is not a question and its answer")
        question, answer = (clean(t, row.mends) for t in exchange)
        turns += [Message("user", question), Message("assistant", answer)]
    text = "\n".join(t for t in (row.text("instruction"), row.text("input")) if t)
    if not text:
        raise Refusal("no_user_turn", "instruction and input are empty")
    return (*turns, Message("user", text))


def _two_outputs(row: Row) -> _Sides:
    row.layout = "preference pairs (alpaca columns, output holds the better and the worse answer)"
    outputs = row["output"]
    if len(outputs) != 2 or not all(isinstance(o, str) for o in outputs):
        raise Refusal("wrong_type", "output is a list, but not of two texts")
    return _answers(alpaca_prompt(row), [clean(o, row.mends) for o in outputs])


def _single(row: Row, rated: bool) -> _Sides:
    """Prompt and completion of a row that compares nothing."""
    kind, label = ("unpaired rows", ", label") if rated else ("demonstrations", "")
    if "completion" in row:
        row.layout = f"{kind} (prompt, completion{label})"
        row.require("prompt")
        prompt, completion = (row.content(row[name], name) for name in ("prompt", "completion"))
        return _explicit(row, prompt, [completion], kind, f"completion{label}")
    for name in ("messages", "conversations"):
        if name in row:
            row.layout = f"{kind} ({name}{label})"
            turns = row.turns(name)
            return _from_last_reply(turns) if rated else _from_first_reply(turns)
    if "instruction" in row:
        row.layout = f"{kind} (alpaca columns{label})"
        row.require("output")
        return _answers(alpaca_prompt(row), [row.text("output")])
    if "text" in row:
        row.layout = "demonstrations (text)"
        return _Sides("", (row.text("text"),))
    raise Refusal("missing_columns", f"the row has {row.columns()}; {_EXPECTED}")


def _from_first_reply(turns: tuple[Message, ...]) -> _Sides:
    """A demonstration is all from the assistant's first turn on."""
    first = next((i for i, m in enumerate(turns) if m.role == "assistant"), None)
    if first is None:
        raise Refusal("no_assistant_turn", f"none of the {len(turns)} turns is the assistant's")
    return _Sides(turns[:first], (turns[first:],))


def _from_last_reply(turns: tuple[Message, ...]) -> _Sides:
    """A label judges the last turn."""
    if not any(m.role == "assistant" for m in turns):
        raise Refusal("no_assistant_turn", f"none of the {len(turns)} turns is the assistant's")
    return _Sides(turns[:-1], (turns[-1:],))


def _with_system(row: Row, sides: _Sides) -> _Sides:
    """The sides with the `system` column as their first message."""
    system = row.text("system")
    if not system:
        return sides
    prompt, completions = sides.prompt, sides.completions
    if isinstance(prompt, str):
        if not prompt:
            raise Refusal("no_user_turn", "a system text, but no prompt")
        prompt = (Message("user", prompt),)
        completions = tuple((Message("assistant", c),) if isinstance(c, str) else c for c in completions)
    first = Message("system", system)
    return _Sides(prompt if prompt[:1] == (first,) else (first, *prompt), completions)


def _check(sides: _Sides, *, ends: bool = True) -> None:
    """Refuse a row with nothing to compare or to learn, or with turns out of order."""
    k = len(sides.completions)
    if len(set(sides.completions)) < k:
        raise Refusal("identical_completions", "chosen and rejected are the same" if k == 2 else "two are the same")
    names = {1: ["the completion"], 2: ["chosen", "rejected"]}.get(k, [f"number {i + 1}" for i in range(k)])
    for name, completion in zip(names, sides.completions, strict=True):
        turns = completion if isinstance(completion, tuple) else (Message("assistant", completion),)
        if not turns or not all(m.content.strip() for m in turns if m.role == "assistant"):
            raise Refusal("empty_completion", f"{name} says nothing")
    for completion in sides.completions:
        if isinstance(sides.prompt, tuple) and isinstance(completion, tuple):
            check_order(sides.prompt, completion, ends=ends)
