"""Completions of prompts, text in and text out: one call for a local model and for an endpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from prefopt.errors import ConfigError
from prefopt.records import Content

__all__ = ["Completed", "Completer", "OnPrompt", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How to draw.

    Attributes:
        max_new_tokens: Longest completion, tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: Below 1, only tokens of the nucleus are drawn.
        stop: Texts that end a completion; they are not part of it.
        seed: Of all samples; each has noise of its own. An endpoint may not honour it.

    Raises:
        ConfigError: a setting is out of bounds.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = [
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop", self.stop, all(self.stop), "no empty text"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ]
        for name, value, good, expected in bounds:
            if not good:
                raise ConfigError(
                    "A sampling setting is out of bounds.", where=name, got=repr(value), expected=expected
                )


@dataclass(frozen=True)
class Completed:
    """One completion.

    Attributes:
        text: Without the prompt, special tokens and stop text.
        finish: "stop" at its own end or a stop text, "length" at the limit, "filtered" where an endpoint held it back.
        tokens: Tokens generated, the one that ended it counted; None where an endpoint does not say.
    """

    text: str
    finish: Literal["stop", "length", "filtered"]
    tokens: int | None


OnPrompt = Callable[[int, Sequence[Completed]], None]


class Completer(Protocol):
    """Whatever completes prompts."""

    def complete(
        self,
        prompts: Sequence[Content],
        completions: int,
        settings: Settings,
        on_prompt: OnPrompt = lambda *_: None,
    ) -> Sequence[Sequence[Completed]]:
        """`completions` samples of each prompt, in prompt order.

        Args:
            on_prompt: Is given each prompt's number and samples when the last of them is there, in the
                order in which they end: what was handed out is not lost if a later prompt fails.
        """
        ...
