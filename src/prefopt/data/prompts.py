"""Prompts without completions: rows -> prompts -> token ids. What `ppo` and sampling start from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prefopt.data.audit import Audit, Refusal
from prefopt.data.formats import alpaca_prompt, pair_sides, transcript_prompt
from prefopt.data.group import CompletionGroup
from prefopt.data.row import Row
from prefopt.data.tokenize import Renderer
from prefopt.data.turns import is_transcript
from prefopt.records import Content, Message, Source

__all__ = ["Prompt", "prompt_groups", "prompt_of"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is to complete, and the row it came from."""

    content: Content
    source: Source


def prompt_of(row: Row, source: Source) -> Prompt:
    """The prompt of a row of any layout; completions that it may have are not looked at.

    Raises:
        Refusal: the row has no prompt, or it says nothing.
    """
    content = _with_system(row, _content(row))
    if not content or isinstance(content, str) and not content.strip():
        raise Refusal("empty_prompt", "the prompt says nothing")
    return Prompt(content, source)


def _content(row: Row) -> Content:
    if "prompt" in row and row["prompt"] not in ("", []):
        row.layout = "prompts"
        content = row.content(row["prompt"], "prompt")
        turns = transcript_prompt(content) if isinstance(content, str) and is_transcript(content) else None
        return turns or content
    for name in ("messages", "conversations"):
        if name in row:
            row.layout = f"prompts ({name} up to the last user turn)"
            return _up_to_the_user(row.turns(name))
    if "instruction" in row:
        row.layout = "prompts (alpaca columns)"
        return alpaca_prompt(row)
    if "chosen" in row and "rejected" in row:
        return pair_sides(row).prompt
    if "prompt" in row:
        raise Refusal("empty_prompt", "the prompt says nothing")
    raise Refusal("missing_columns", f"the row has {row.columns()}; expected prompt, messages, or instruction")


def _up_to_the_user(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    last = max((i for i, m in enumerate(turns) if m.role == "user"), default=None)
    if last is None:
        raise Refusal("no_user_turn", f"none of the {len(turns)} turns is the user's")
    return turns[: last + 1]


def _with_system(row: Row, content: Content) -> Content:
    system = row.text("system")
    if not system:
        return content
    first = Message("system", system)
    turns = (Message("user", content),) if isinstance(content, str) else content
    return turns if turns[:1] == (first,) else (first, *turns)


def prompt_groups(
    prompts: Iterable[Prompt], renderer: Renderer, *, longest: int, audit: Audit
) -> Iterator[CompletionGroup]:
    """Token ids of every prompt as a group without completions; a prompt is never cut.

    Args:
        longest: Tokens a prompt may have, so that a completion still fits; longer ones are refused.
    """
    for prompt in prompts:
        try:
            ids = renderer.opening_ids(prompt.content)
            if len(ids) > longest:
                raise Refusal("prompt_too_long", f"{len(ids)} tokens, and there is room for {longest}")
        except Refusal as refusal:
            audit.refuse(prompt.source, refusal.reason, refusal.detail)
            continue
        yield CompletionGroup(ids, (), prompt.source)
