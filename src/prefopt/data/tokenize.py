"""Records -> completion groups: the one place where text becomes token ids.

The prompt's ids are those inference would feed the model, and all completions of a group share
them. A completion is what the model then has to emit, its end of turn (or EOS) included.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, SupportsInt

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from prefopt.data.audit import Audit, Refusal
from prefopt.data.fit import fit
from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.template import ChatWriter, Opening, Piece, PlainWriter, Writer, pieces, special_tokens
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.records import Comparison, Content, Message, Ranking, Rating, Record

__all__ = ["Renderer", "Rendering", "tokenize"]

_CHUNK = 1000  # records encoded in one call of the tokenizer

# A completion that must not merge with its prompt is encoded behind one of these; which of them
# stands apart depends on the tokenizer. Special tokens come first where byte-level BPE is concerned,
# but SentencePiece-like normalisers put a space behind them, so every candidate is tried.
_ANCHORS = ("\n", "\x02", "a", ".", "0", ")", "é")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A record as text: its prompt, and each completion in pieces.

    `bos`: the tokenizer's own start of text belongs in front (a chat template writes its own).
    `trailing_turns`: completions ended with turns that are not the assistant's; they are left out.
    """

    prompt: str
    completions: tuple[tuple[Piece, ...], ...]
    bos: bool
    trailing_turns: bool = False

    def texts(self) -> list[str]:
        """All strings to encode: the prompt, then for each completion the text up to each piece's end."""
        found = [self.prompt]
        for completion in self.completions:
            text = self.prompt
            for piece in completion:
                text += piece.text
                found.append(text)
        return found


class Renderer:
    """Turns prompts and completions into token ids for one model.

    Args:
        tokenizer: The model's tokenizer.
        template: "auto" takes the chat template where there is one; "chat" insists on it; "plain"
            writes conversations as Human:/Assistant: text and leaves other text as it stands.
        eos_ids: Further ids at which the model stops (its generation configuration's).

    Attributes:
        description: One sentence for the user: how text becomes tokens.
        stop_ids: Ids at which sampling stops.

    Raises:
        ConfigError: template "chat", and the model has none.
        ModelError: the chat template cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: Literal["auto", "chat", "plain"] = "auto",
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        has_template = tokenizer.chat_template is not None
        if template == "chat" and not has_template:
            raise ConfigError(
                "The model has no chat template.",
                where="template",
                got="chat",
                expected="a tokenizer with a chat template, or auto or plain",
                todo="Use --template plain: conversations are then written as Human:/Assistant: text.",
            )
        chat = _chat_writer(tokenizer) if has_template and template != "plain" else None
        self._chat = chat is not None
        self._writer: Writer = chat or PlainWriter()
        self._specials = special_tokens(tokenizer)
        ids = tokenizer.get_vocab()
        self._special_ids = {ids[s] for s in self._specials if s in ids}
        self._bos = self._start_of_text()
        ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._eos = (*ends, *sorted(eos_ids))[:1]
        if chat and chat.end_of_turn:
            ends.append(ids[chat.end_of_turn])
        self.stop_ids = eos_ids | frozenset(ends)
        self._stops = tuple(str(t) for t in tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)) if t)
        self.description = self._describe(has_template, closed=bool(chat and chat.end_of_turn))

    @property
    def start_id(self) -> int | None:
        """The id a text begins with, if this tokenizer has one."""
        return self._bos[0] if self._bos else self._tokenizer.bos_token_id

    def _start_of_text(self) -> list[int]:
        """The ids the tokenizer puts in front of a text by itself."""
        bare, full = self._encode(["a"])[0], self._encode(["a"], special=True)[0]
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        return full[: starts[0]] if starts else []

    def _describe(self, has_template: bool, *, closed: bool) -> str:
        if self._chat:
            text = "chat template of the model"
        else:
            why = "chat template not used (template: plain)" if has_template else "no chat template"
            text = f"{why}: conversations are written as Human:/Assistant: text, other text stands as it is"
        if not closed and not self._eos:
            text += "; the tokenizer has no end-of-sequence token, so ends of completions are not trained"
        return text

    def _encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # too long is dealt with here, and counted
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def prompt_ids(self, prompt: Content) -> Int32[np.ndarray, " tokens"]:
        """What the model sees when it is to answer `prompt`; a string is one user turn if there is a template.

        Raises:
            DataError: the template does not take the prompt, or it is empty.
        """
        try:
            return self.opening_ids(prompt)
        except Refusal as refusal:
            raise DataError("The prompt cannot be rendered.", got=refusal.detail) from refusal

    def opening_ids(self, prompt: Content) -> Int32[np.ndarray, " tokens"]:
        """`prompt_ids` of a row's prompt, which is refused if it cannot be had.

        Raises:
            Refusal: says why.
        """
        opening, bos = self._open(prompt)
        ids = self._prompt(self._encode([opening.prompt])[0], bos)
        if not ids:
            raise Refusal("empty_prompt", "the prompt is empty, and this model has no start-of-text token")
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of `ids` without special tokens; a leading space of a continuation is kept."""
        given = [int(i) for i in ids]
        spoken = [i for i in given if i not in self._special_ids]
        if given[:1] != spoken[:1]:  # a start of text
            return self._decode(spoken)
        # SentencePiece-like decoders strip the space a text begins with: decode behind an anchor.
        anchor = self._encode(["a"])[0]
        before = self._decode(anchor)
        text = self._decode(anchor + spoken)
        return text[len(before) :] if text.startswith(before) else self._decode(spoken)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _open(self, prompt: Content) -> tuple[Opening, bool]:
        """The prompt's text, and whether the tokenizer's start of text belongs in front of it."""
        if isinstance(prompt, tuple):
            return self._writer.opening(prompt), not self._chat
        if self._chat and prompt:
            return self._writer.opening((Message("user", prompt),)), False
        return Opening(prompt), True

    def render(self, prompt: Content, completions: Sequence[Content]) -> Rendering:
        """A record as text.

        Raises:
            Refusal: the row cannot be written; says why.
        """
        if isinstance(prompt, str):
            texts = [c for c in completions if isinstance(c, str)]
            assert len(texts) == len(completions), "prompt and completions are of one kind"
            if not (self._chat and prompt):
                return Rendering(prompt, tuple((self._verbatim(c),) for c in texts), bos=True)
            self._refuse_templated(prompt, *texts)
            prompt, completions = (Message("user", prompt),), [(Message("assistant", c),) for c in texts]
        turns = [c for c in completions if isinstance(c, tuple)]
        assert len(turns) == len(completions), "prompt and completions are of one kind"
        prompt, turns = _leading_turns(prompt, turns)
        opening, bos = self._open(prompt)
        written = tuple(pieces(self._writer, opening, prompt, c) for c in turns)
        return Rendering(opening.prompt, written, bos, any(c[-1].role != "assistant" for c in turns))

    def _verbatim(self, text: str) -> Piece:
        """Text as it stands; an end it brings along is not written twice."""
        stripped = text.rstrip()
        closed = bool(self._stops) and stripped.endswith(self._stops)
        return Piece(stripped if closed else text, trainable=True, close=not closed)

    def _refuse_templated(self, *texts: str) -> None:
        held = sorted(s for s in self._specials if any(s in t for t in texts))
        if len(held) > 1:
            raise Refusal(
                "already_templated",
                f"the text already holds {' and '.join(held[:2])}, which the chat template would write again; "
                "use --template plain to take it as it stands",
            )

    def _prompt(self, ids: list[int], bos: bool) -> list[int]:
        if bos and ids[: len(self._bos)] != self._bos:
            ids = self._bos + ids
        if not ids:  # a text from its very beginning: something has to predict its first token
            ids = list(self._eos) if self.start_id is None else [self.start_id]
        return ids

    def group(self, record: Record, rendering: Rendering, encoded: Iterator[list[int]]) -> CompletionGroup:
        """The group of `record`, uncut.

        Args:
            rendering: `render` of the record.
            encoded: Ids of `rendering.texts()`, without the tokenizer's start of text.

        Raises:
            Refusal: no token boundary between prompt and completion, or nothing to predict from.
        """
        bare = next(encoded)
        prompt = self._prompt(bare, rendering.bos)
        made = [self._completion(rendering.prompt, bare, c, encoded) for c in rendering.completions]
        if not bare and prompt:  # the text brought its start of text along
            made = [c[1:] if c[:1] == [(prompt[0], True)] else c for c in made]
        if not prompt:
            if len(made) > 1 or not made[0]:
                raise Refusal("empty_prompt", "the model has no start-of-text token to predict the first token from")
            prompt, made = [made[0][0][0]], [made[0][1:]]
        for number in np.flatnonzero(record.cut):
            made[number] = self._without_end(made[number])
        return CompletionGroup(
            np.array(prompt, dtype=np.int32),
            tuple(
                Completion(np.array([i for i, _ in c], dtype=np.int32), np.array([t for _, t in c], dtype=bool))
                for c in made
            ),
            record.source,
            record.weight,
            truncated=any(record.cut),
            label=_label(record),
            margin=record.margin if isinstance(record, Comparison) else 0.0,
        )

    def _without_end(self, completion: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
        """What stands before the last token that ends a turn or a text."""
        ends = [place for place, (token, _) in enumerate(completion) if token in self.stop_ids]
        return completion[: ends[-1]] if ends else completion

    def _completion(
        self, text: str, prompt: list[int], completion: tuple[Piece, ...], encoded: Iterator[list[int]]
    ) -> list[tuple[int, bool]]:
        """(id, trainable) of each token behind the prompt."""
        so_far, found = prompt, list[tuple[int, bool]]()
        for piece in completion:
            ids = self._continue(so_far, piece.text, next(encoded))
            found += [(i, piece.trainable) for i in ids]
            if piece.close and not (ids and ids[-1] in self.stop_ids):
                found += [(i, True) for i in self._eos]
            so_far = so_far + ids
        return found

    def _continue(self, prefix: list[int], text: str, joint: list[int]) -> list[int]:
        """Ids of `text` behind `prefix`; `joint` are those of both together.

        Where the tokens of both together do not begin with the prefix (a token would span the
        boundary), `text` is encoded behind an anchor that keeps SentencePiece from adding a space.
        """
        if joint[: len(prefix)] == prefix:
            return joint[len(prefix) :]
        wanted = self._decode_all(joint)
        for anchor in (*sorted(self._specials), *_ANCHORS):
            before, both = self._encode([anchor, anchor + text])
            ids = both[len(before) :]
            if both[: len(before)] == before and self._decode_all(prefix + ids) == wanted:
                return ids
        raise Refusal("no_token_boundary", f"the tokenizer cannot split before {text[:40]!r}")

    def _decode_all(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def groups(self, records: Sequence[Record], audit: Audit) -> Iterator[CompletionGroup]:
        """Uncut groups of `records`, encoded in one call; rows that cannot be rendered are refused."""
        rendered: list[tuple[Record, Rendering]] = []
        for record in records:
            try:
                rendered.append((record, self.render(record.prompt, _completions(record))))
            except Refusal as refusal:
                audit.refuse(record.source, refusal.reason, refusal.detail)
        encoded = iter(self._encode([text for _, rendering in rendered for text in rendering.texts()]))
        for record, rendering in rendered:
            own = islice(encoded, len(rendering.texts()))
            try:
                group = self.group(record, rendering, iter(list(own)))
            except Refusal as refusal:
                audit.refuse(record.source, refusal.reason, refusal.detail)
                continue
            if rendering.trailing_turns:
                audit.mend(record.source, "trailing_turns_left_out", "nothing follows them to train on")
            yield group


def _chat_writer(tokenizer: PreTrainedTokenizerBase) -> ChatWriter:
    try:
        tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them called "default"
        raise ModelError(
            "The model has several chat templates and no default one.",
            where=f"chat_template of {tokenizer.name_or_path or 'the tokenizer'}",
            got=", ".join(tokenizer.chat_template),
            expected='one called "default"',
            todo="Name one of them default in the model folder, or use --template plain.",
        ) from error
    return ChatWriter(tokenizer)


def _leading_turns(
    prompt: tuple[Message, ...], completions: list[tuple[Message, ...]]
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """Moves turns that stand before every completion's first assistant turn into the prompt."""
    if any(not any(m.role == "assistant" for m in c) for c in completions):
        raise Refusal("no_assistant_turn", "a completion has no assistant turn")
    while completions[0][0].role != "assistant" and all(c[0] == completions[0][0] for c in completions):
        prompt, completions = (*prompt, completions[0][0]), [c[1:] for c in completions]
    if any(c[0].role != "assistant" for c in completions):
        raise Refusal("prompts_differ", "the completions begin with different turns that are not the assistant's")
    return prompt, completions


def _label(record: Record) -> float:
    if isinstance(record, Rating):
        return record.probability if record.label else 1 - record.probability
    return record.probability if isinstance(record, Comparison) else 1.0


def _completions(record: Record) -> tuple[Content, ...]:
    if isinstance(record, Ranking):
        return record.completions
    return (record.chosen, record.rejected) if isinstance(record, Comparison) else (record.completion,)


def tokenize(
    records: Iterable[Record],
    renderer: Renderer,
    *,
    max_length: int,
    max_prompt_length: int,
    audit: Audit,
) -> Iterator[CompletionGroup]:
    """Token ids of every usable record, one at a time in their order; what is cut or refused is told to `audit`.

    Args:
        max_length: Most tokens of prompt plus longest completion.
        max_prompt_length: Where a row is longer, its prompt keeps this many last tokens (a
            start-of-text token at its front included), then its completions are cut; a cut
            completion loses its EOS.

    Raises:
        ConfigError: `max_prompt_length` leaves no room for a completion.
    """
    if max_prompt_length >= max_length:
        raise ConfigError(
            "max_prompt_length leaves no room for completions.",
            where="max_prompt_length",
            got=str(max_prompt_length),
            expected=f"less than max_length, {max_length}",
        )
    rows = iter(records)
    while chunk := list(islice(rows, _CHUNK)):
        for group in renderer.groups(chunk, audit):
            try:
                yield fit(group, max_length, max_prompt_length, renderer.start_id, audit)
            except Refusal as refusal:
                audit.refuse(group.source, refusal.reason, refusal.detail)
