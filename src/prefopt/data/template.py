"""Conversations -> text: the model's chat template, or Human:/Assistant: text where there is none.

Everything here is about what inference sees. A prompt is rendered as it is for sampling, the
generation prompt included; a reply is what the model then has to write, up to its end of turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from prefopt.data.audit import Refusal
from prefopt.errors import ModelError
from prefopt.records import Message

__all__ = ["ChatWriter", "Opening", "Piece", "PlainWriter", "Reply", "Writer", "pieces", "special_tokens"]

_SENTINEL = "prefoptSentinelReply7f3a"
_HEADERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "tool": "\n\nTool: "}


@dataclass(frozen=True, slots=True)
class Opening:
    """A conversation up to where the assistant writes: the prompt's text and what belongs to the next reply.

    `before` and `after` are the whole conversation around the reply; `head` and `tail` the parts
    of them that the model writes itself. `closed`: the tail ends with an end-of-turn token.
    """

    prompt: str
    before: str = ""
    after: str = ""
    head: str = ""
    tail: str = ""
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model writes for one assistant turn; not `closed`: an EOS has to follow."""

    text: str
    closed: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a completion; `close` puts an EOS token behind it."""

    text: str
    trainable: bool
    close: bool


class PlainWriter:
    """The Human:/Assistant: text of the HH dialogues, system text first."""

    def opening(self, messages: Sequence[Message]) -> Opening:
        """The dialogue up to and including the last "\\n\\nAssistant:"."""
        parts = [_HEADERS.get(m.role, "\n\n" if i else "") + m.content for i, m in enumerate(messages)]
        return Opening("".join(parts) + _HEADERS["assistant"].rstrip(" "))

    def reply(self, opening: Opening, messages: Sequence[Message], content: str) -> Reply:
        """A space and the content."""
        return Reply(" " + content, closed=False)


class ChatWriter:
    """The tokenizer's own chat template; `end_of_turn` is the token that closes a reply, if there is one.

    Raises:
        ModelError: the template cannot be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        specials = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(s) for s in specials) or r"(?!)")
        # A template may ignore add_generation_prompt: then all it writes before a reply's content
        # is the model's to write, be it Llama-2's space or a whole "<|im_start|>assistant" header.
        self._has_generation_prompt = True
        self.end_of_turn: str | None = None
        user = (Message("user", "x"),)
        try:
            self._has_generation_prompt = self._render(user, True) != self._render(user, False)
            opening = self.opening(user)
        except Refusal as refusal:
            if refusal.reason != "template_refused":
                raise ModelError(
                    "The model's chat template cannot be used.",
                    where=f"chat_template of {tokenizer.name_or_path or 'the tokenizer'}",
                    got=refusal.detail,
                    expected="a Jinja template that writes every turn's content",
                    todo="Mend the template, or use --template plain.",
                ) from refusal
        else:
            ends = self._special.search(opening.tail)
            self.end_of_turn = ends.group() if ends else None

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        if not messages:
            raise Refusal("template_refused", "the chat template needs at least one turn before the assistant's")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
        except TemplateError as error:
            reason = "template_unreadable" if isinstance(error, TemplateSyntaxError) else "template_refused"
            raise Refusal(reason, f"the chat template says: {error}") from error
        assert isinstance(text, str)
        return text

    def opening(self, messages: Sequence[Message]) -> Opening:
        """The prompt as inference renders it, and what the template writes around a reply to it.

        Raises:
            Refusal: the template does not take this conversation.
        """
        prompt = self._render(messages, True)
        whole = self._render((*messages, Message("assistant", _SENTINEL)), False)
        before, found, after = whole.rpartition(_SENTINEL)
        if not found:
            raise Refusal("template_drops_content", "the chat template does not write the assistant's content")
        # The whole need not continue the prompt: templates put an empty <think></think> before the
        # last reply, or open <think> in the generation prompt alone. The prompt stays what
        # inference sees; of what stands between it and the content only blanks (or what closes a
        # tag the prompt opened) are kept, since inference would not write the rest either.
        head = before[len(prompt) :] if before.startswith(prompt) else ""
        if self._has_generation_prompt and head.strip() and not head.lstrip().startswith("</"):
            head = ""
        # Behind the end-of-turn token nothing is ever sampled: "<|im_end|>\n" ends at "<|im_end|>".
        end = self._special.search(after)
        tail = after[: end.end()] if end else after.rstrip()
        return Opening(prompt, before, after, head, tail, closed=end is not None)

    def reply(self, opening: Opening, messages: Sequence[Message], content: str) -> Reply:
        """Content as the template writes it behind `opening` (of the same `messages`), head and tail included."""
        whole = self._render((*messages, Message("assistant", content)), False)
        return Reply(_written(opening, whole, content) + opening.tail, opening.closed)


Writer = PlainWriter | ChatWriter


def _written(opening: Opening, whole: str, content: str) -> str:
    """Head and content of a reply: the template's version of it (trimmed, say) if nothing is lost in it."""
    stop = len(whole) - len(opening.after)
    if whole.endswith(opening.after):
        if whole.startswith(opening.before):
            middle = whole[len(opening.before) : stop]
            if middle.strip() == content.strip():
                return opening.head + middle
        if whole.startswith(opening.prompt):  # a content with its own thinking, laid out anew
            region = whole[len(opening.prompt) : stop]
            if _squeezed(opening.prompt + region).endswith(_squeezed(content)):
                return region
    # The template drops part of the content (thinking, as a rule): the row's own text stands.
    if opening.prompt.rstrip().endswith("<think>") and content.lstrip().startswith("<think>"):
        return content.lstrip().removeprefix("<think>").lstrip("\n")
    return content


def _squeezed(text: str) -> str:
    return "".join(text.split())


def pieces(
    writer: Writer, opening: Opening, prompt: Sequence[Message], completion: Sequence[Message]
) -> tuple[Piece, ...]:
    """A completion of one or several turns as pieces of text; assistant turns are trainable.

    Args:
        opening: `writer.opening(prompt)`.

    Raises:
        Refusal: a later turn changes how an earlier one is written, so that no one text serves
            all the replies; or the template refuses the conversation.
    """
    found: list[Piece] = []
    history = list(prompt)
    text = opening.prompt
    for i, message in enumerate(completion):
        if message.role == "assistant":
            here = writer.opening(history) if i else opening
            if not here.prompt.startswith(text):
                raise Refusal(
                    "template_not_prefix_stable",
                    "the chat template writes earlier turns differently once later ones follow; "
                    "split the conversation so that each row has one assistant turn to train on",
                )
            if len(here.prompt) > len(text):
                found.append(Piece(here.prompt[len(text) :], trainable=False, close=False))
            reply = writer.reply(here, history, message.content)
            found.append(Piece(reply.text, trainable=True, close=not reply.closed))
            text = here.prompt + reply.text
        history.append(message)
    return tuple(found)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Texts of the tokens that structure a conversation.

    Some models add "<|im_end|>" without marking it special; added blanks and HTML tags are not meant.
    """
    added = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or re.fullmatch(r"<\|.*\|>", token.content)
    }
    return frozenset(added | set(tokenizer.all_special_tokens))
