"""Talk to a model in the terminal, or pipe prompts in."""

import sys
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from prefopt.data.tokenize import Renderer
from prefopt.errors import ConfigError, DataError
from prefopt.model.generate import own_distribution
from prefopt.model.load import LoadedModel, eos_ids, load_model, max_positions
from prefopt.progress import say
from prefopt.records import Message

__all__ = ["chat"]

_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_NEXT_TURN = "\n\nHuman:"


def chat(
    path: str,
    *,
    system: str | None,
    temperature: float,
    max_new_tokens: int,
    seed: int | None,
    template: Literal["auto", "chat", "plain"],
) -> None:
    """Read prompts from stdin, a line each, and write answers to stdout as they come.

    A model with a chat template holds a conversation; one without continues each line as text,
    unless `template` is "plain": then the conversation is written as Human:/Assistant: text.
    On a terminal a `>` asks; piped input is answered line by line and ends at its end.

    Raises:
        ConfigError: a system message where text is continued.
        DataError: the input is not UTF-8.
        KeyboardInterrupt: Ctrl-C at the prompt.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = load_model(path, dtype=dtype, device=device)
    renderer = Renderer(loaded.tokenizer, template=template, eos_ids=eos_ids(path, loaded.tokenizer))
    plain = template == "plain"
    conversation = plain or bool(loaded.tokenizer.chat_template)
    if system and not conversation:
        raise ConfigError(
            "A system message does nothing here: the model continues text.",
            where="flag --system",
            todo="Leave it out, use a model with a chat template, or add --template plain.",
        )
    if seed is not None:
        torch.manual_seed(seed)
    talk = _Talk(loaded, renderer, temperature, max_new_tokens, conversation, system, _NEXT_TURN if plain else None)
    if sys.stdin.isatty():
        say(f"{path}: {renderer.description}\n{_HELP}")
    while (line := _ask()) is not None:
        if line in ("/quit", "/exit"):
            return
        if line == "/help":
            say(_HELP)
        elif line == "/reset":
            talk.reset()
        elif line.strip():
            talk.answer(line)


def _ask() -> str | None:
    """The next line, or None at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError("The input is not text.", where="standard input", got=str(error), expected="UTF-8") from error
    return line.rstrip("\n") if line else None


class _Talk:
    """One conversation: its turns so far and how they are answered."""

    def __init__(
        self,
        loaded: LoadedModel,
        renderer: Renderer,
        temperature: float,
        max_new_tokens: int,
        conversation: bool,
        system: str | None,
        next_turn: str | None,
    ) -> None:
        self.loaded, self.renderer = loaded, renderer
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.conversation, self.next_turn = conversation, next_turn
        self.system = [Message("system", system)] if system else []
        self.limit = max_positions(loaded.model.config)
        self.reset()

    def reset(self) -> None:
        """Forget every turn but the system message."""
        self.turns: list[Message] = []

    def answer(self, line: str) -> None:
        """Write the answer to `line` on stdout, token by token; Ctrl-C ends it where it is, even before the first."""
        stream = _Collected(self.loaded.tokenizer, self.next_turn)
        if self.conversation:
            self.turns.append(Message("user", line))
        try:
            self._generate(self._fitting(line), stream)
        except KeyboardInterrupt:
            stream.end()  # type: ignore[no-untyped-call]
            say("(stopped)")
        if self.conversation:
            self.turns.append(Message("assistant", stream.text))

    def _fitting(self, line: str) -> Int32[np.ndarray, " tokens"]:
        """The prompt's ids; the oldest turns are dropped, and that is said, until it leaves room for an answer."""

        def render() -> Int32[np.ndarray, " tokens"]:
            return self.renderer.prompt_ids((*self.system, *self.turns) if self.conversation else line)

        room = None if self.limit is None else self.limit - min(self.max_new_tokens, self.limit // 4)
        ids = render()
        while room is not None and len(ids) > room:
            if len(self.turns) < 3:
                say(f"the prompt is longer than the model holds; only its last {room} tokens are read")
                return ids[-room:]
            say("the conversation is longer than the model holds; its oldest turns are forgotten")
            del self.turns[:2]
            ids = render()
        return ids

    def _generate(self, ids: Int32[np.ndarray, " tokens"], stream: "_Collected") -> None:
        prompt = torch.from_numpy(ids.astype(np.int64))[None].to(self.loaded.model.device)
        room = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - len(ids))
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=room,
            eos_token_id=sorted(self.renderer.stop_ids) or None,
            pad_token_id=0,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
        )
        with own_distribution(self.loaded.model):
            self.loaded.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([stream]),
            )


class _Collected(TextStreamer, StoppingCriteria):
    """Prints text as it is finished and keeps it for the conversation, up to where another's turn begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, next_turn: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.next_turn = next_turn
        self.text = ""
        self.printed = 0
        self.ended = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each printable piece."""
        if not self.ended:
            self.text += text
        held = 0
        if self.next_turn:
            before, mark, _ = self.text.partition(self.next_turn)
            self.text, self.ended = before, self.ended or bool(mark)
            sizes = range(len(self.next_turn), 0, -1)
            # What may yet become the mark is held back.
            held = 0 if stream_end else next((n for n in sizes if before.endswith(self.next_turn[:n])), 0)
        shown = len(self.text) - held
        print(self.text[self.printed : shown], end="\n" if stream_end else "", flush=True)
        self.printed = max(self.printed, shown)

    def __call__(self, input_ids: Int[Tensor, "rows tokens"], scores: object, **_: object) -> Bool[Tensor, " rows"]:
        """Called by transformers after each token: whether to stop."""
        return torch.full((len(input_ids),), self.ended, device=input_ids.device)
