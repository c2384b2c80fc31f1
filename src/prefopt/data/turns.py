"""Conversations as they are written in data files -> messages in an order a chat template takes."""

import re
from collections.abc import Sequence
from typing import Any

from prefopt.data.audit import Refusal
from prefopt.records import Message, Role

__all__ = [
    "Mends",
    "check_order",
    "clean",
    "common_history",
    "is_transcript",
    "kind_of",
    "messages",
    "shared_beginning",
    "transcript_turns",
    "transcripts",
]

Mends = list[str]  # reasons for which the row at hand was changed

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # LLaMA-Factory: the call as text, written by the model
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_FOLLOWS: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK = re.compile(r"\n\n(Human|Assistant):")
_START = re.compile(r"\s*(?:Human|Assistant):")
_REPLY = "\n\nAssistant:"


def clean(text: str, mends: Mends) -> str:
    """The text with NUL characters and lone surrogates replaced by U+FFFD; says so in `mends`."""
    if "\0" in text:
        mends.append("nul_characters")
        text = text.replace("\0", "\ufffd")
    if not text.isascii() and _SURROGATE.search(text):
        mends.append("lone_surrogates")
        text = _SURROGATE.sub("\ufffd", text)
    return text


def messages(value: Any, name: str, mends: Mends) -> tuple[Message, ...]:
    """Messages from a list of `role`/`content` or `from`/`value` objects, or from one such object.

    Raises:
        Refusal: not of this shape, an unknown role, or content that is not text.
    """
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list):
        raise Refusal("wrong_type", f"{name} is {kind_of(value)}, not a list of messages")
    return tuple(_message(turn, f"{name}[{i}]", mends) for i, turn in enumerate(turns))


def _message(turn: Any, name: str, mends: Mends) -> Message:
    if not isinstance(turn, dict):
        raise Refusal("wrong_type", f"{name} is {kind_of(turn)}, not a message")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role is None or content is None:
        if turn.get("tool_calls"):
            raise Refusal("wrong_type", f"{name} has tool_calls in place of text")
        raise Refusal("wrong_type", f"{name} has no role and content (or from and value); it has {sorted(turn)!r:.80}")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise Refusal("unknown_role", f"{name} is from {role!r:.40}")
    if turn.get("tool_calls"):
        raise Refusal("wrong_type", f"{name} has tool_calls, which are not text")
    return Message(_ROLES[role.lower()], clean(_content(content, name), mends))


def _content(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise Refusal("wrong_type", f"the content of {name} is {kind_of(content)}, not text")


def kind_of(value: Any) -> str:
    """The kind of a value as people call it."""
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def check_order(prompt: Sequence[Message], completion: Sequence[Message], *, ends: bool) -> None:
    """Refuse a conversation whose turns do not follow each other as turns do.

    A system message stands first or nowhere, a user turn follows, then the assistant's; tool turns
    stand between two of the assistant's.

    Args:
        completion: Begins with an assistant turn.
        ends: The completion also has to end with one.

    Raises:
        Refusal: no_user_turn or roles_out_of_order.
    """
    turns = (*prompt, *completion)
    if not any(m.role == "user" for m in turns):
        raise Refusal("no_user_turn", "nobody speaks to the assistant")
    before: Role | None = None
    for i, message in enumerate(turns):
        if message.role not in _FOLLOWS[before]:
            place = f"follows {before}" if before else "is first"
            raise Refusal("roles_out_of_order", f"turn {i + 1}: {message.role} {place}")
        before = message.role
    if completion[0].role != "assistant":
        raise Refusal("roles_out_of_order", f"the completion is from {completion[0].role}, not from the assistant")
    if ends and before != "assistant":
        raise Refusal("roles_out_of_order", f"the last turn is from {before}, not from the assistant")


def common_history(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Shared prompt, then what is left of each of two whole conversations.

    The prompt is the longest shared beginning that leaves each side a completion from the
    assistant. A completion may hold tool turns; once another user turn stands in it, the
    conversations had parted before and do not compare two answers to one prompt.

    Raises:
        Refusal: prompts_differ.
    """
    most = min(len(chosen), len(rejected)) - 1
    n = 0
    while n < most and chosen[n] == rejected[n]:
        n += 1
    # What a tool says is not the model's to write: the completion begins with the call before it.
    while n and "tool" in (chosen[n].role, rejected[n].role):
        n -= 1
    rests = chosen[n:], rejected[n:]
    for rest in rests:
        if any(m.role in ("user", "system") for m in rest):
            parted = "at the first turn" if n == 0 else f"behind turn {n}"
            raise Refusal("prompts_differ", f"chosen and rejected part {parted} and go on with other user turns")
    return chosen[:n], *rests


def is_transcript(text: str) -> bool:
    r"""Whether the text begins with a turn of the HH dialogues (`\n\nHuman:` or `\n\nAssistant:`)."""
    return _START.match(text) is not None


def transcript_turns(text: str) -> tuple[Message, ...]:
    r"""Turns of a `\n\nHuman: ...\n\nAssistant: ...` text; the one space behind a mark is not content."""
    parts = _MARK.split("\n\n" + text.lstrip())  # "", role, content, role, content, ...
    return tuple(
        Message("user" if role == "Human" else "assistant", content.removeprefix(" "))
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    )


def transcripts(chosen: str, rejected: str) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    r"""Shared prompt, chosen and rejected reply of two whole transcripts.

    As in the DPO reference code the prompt is everything up to the last `\n\nAssistant:`.

    Raises:
        Refusal: a transcript without a reply, or prompts_differ.
    """
    (before, reply), (other_before, other_reply) = (_last_reply(t) for t in (chosen, rejected))
    if before != other_before:
        same = len(_prefix(before, other_before))
        raise Refusal(
            "prompts_differ",
            f"chosen has {before[same : same + 40]!r} where rejected has {other_before[same : same + 40]!r}",
        )
    return transcript_turns(before), (Message("assistant", reply),), (Message("assistant", other_reply),)


def _last_reply(text: str) -> tuple[str, str]:
    before, mark, reply = text.rpartition(_REPLY)
    if not mark or _MARK.search(reply):
        raise Refusal("roles_out_of_order", "a transcript ends with a Human turn")
    return before, reply.removeprefix(" ")


def _prefix(a: str, b: str) -> str:
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves: slices compare at memory speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return a[:low]


def shared_beginning(chosen: str, rejected: str) -> str:
    """The implicit prompt of two whole texts: their common beginning, up to the end of a word.

    It ends before white space, so that completions begin with their own (" good", " bad"), and
    leaves each side something to say. It may be "".
    """
    end = len(_prefix(chosen, rejected))
    longest = min(end, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    for p in range(longest, 0, -1):
        if chosen[p].isspace() and rejected[p].isspace() and not chosen[p - 1].isspace():
            return chosen[:p]
    return ""
