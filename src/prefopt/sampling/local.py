"""Completions from a model in this process."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int32

from prefopt.data.tokenize import Renderer
from prefopt.model.load import LoadedModel, eos_ids
from prefopt.model.sample import Sampled, sample
from prefopt.records import Content
from prefopt.sampling.completions import Completed, OnPrompt, Settings

__all__ = ["LocalCompleted", "LocalModel"]


@dataclass(frozen=True)
class LocalCompleted(Completed):
    """A completion with its tokens.

    Attributes:
        ids: Tokens generated, the one that ended it included.
        logprobs: Of each, under the model itself, nats (see `model.choose.Sampled`).
    """

    ids: Int32[np.ndarray, " tokens"]
    logprobs: Float32[np.ndarray, " tokens"]


@dataclass(frozen=True)
class LocalModel:
    """A model, perhaps one that is being trained, and how it is written to.

    Attributes:
        batch_tokens: Bound of the tokens held in caches at once.
    """

    model: torch.nn.Module
    renderer: Renderer
    batch_tokens: int = 32768

    @classmethod
    def of(cls, loaded: LoadedModel) -> "LocalModel":
        """With the model's own chat template, if it has one."""
        return cls(loaded.model, Renderer(loaded.tokenizer, eos_ids=eos_ids(loaded.path, loaded.tokenizer)))

    def complete(
        self,
        prompts: Sequence[Content],
        completions: int,
        settings: Settings,
        on_prompt: OnPrompt = lambda *_: None,
    ) -> list[list[LocalCompleted]]:
        """`completions` samples of each prompt, in prompt order; the same for the same seed (see `model.sample`).

        A text of `settings.stop` is looked for when a sample has ended, so it saves no time.
        """
        found: list[list[LocalCompleted]] = [[] for _ in prompts]

        def ended(number: int, drawn: list[Sampled]) -> None:
            found[number] = [self._completed(one, settings.stop) for one in drawn]
            on_prompt(number, found[number])

        sample(
            self.model,
            [self.renderer.prompt_ids(p) for p in prompts],
            completions=completions,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop_ids=self.renderer.stop_ids,
            seed=settings.seed,
            batch_tokens=self.batch_tokens,
            on_prompt=ended,
        )
        return found

    def _completed(self, one: Sampled, stop: tuple[str, ...]) -> LocalCompleted:
        decode = self.renderer.decode
        text, count = decode(one.ids), len(one.ids)
        starts = [at for at in map(text.find, stop) if at >= 0]
        if starts:
            text = text[: min(starts)]
            count = bisect_left(range(count), True, key=lambda n: any(s in decode(one.ids[:n]) for s in stop))
        ended = bool(starts) or one.finished
        return LocalCompleted(text, "stop" if ended else "length", count, one.ids[:count], one.logprobs[:count])
