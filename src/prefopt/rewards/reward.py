"""What a reward is to everything that uses one: a name, a fingerprint, and scores that are checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from prefopt.errors import RewardError
from prefopt.records import Content

__all__ = ["Reward", "cases"]

_SHOWN = 3  # cases named in a message
_WIDEST = 100  # characters of a text in a message


@dataclass(frozen=True)
class Reward:
    """A function of prompts and completions.

    Attributes:
        name: As the user named it.
        fingerprint: Of what it computes: two rewards with the same one give the same scores.
        function: (prompts, completions), one prompt a completion -> a number for each, as a list, an
            array or a tensor. What it gives is checked here.
        tokenizer_fingerprint: Of a reward model's tokenizer; None where there is none.
        code: Whether it is a function of the user's, who may mend it while a run waits.
    """

    name: str
    fingerprint: str
    function: Callable[[Sequence[Content], Sequence[str]], object]
    tokenizer_fingerprint: str | None = None
    code: bool = False

    def score(self, prompts: Sequence[Content], completions: Sequence[str]) -> Float64[np.ndarray, " completions"]:
        """A finite number for each completion.

        Args:
            prompts: One for each completion; the same one again for each of its completions.

        Raises:
            RewardError: the function gives no numbers, not as many as there are completions, or one that is
                NaN or infinite; names prompts and completions.
        """
        assert len(prompts) == len(completions)
        if not completions:
            return np.zeros(0)
        values = self._values(self.function(prompts, completions), prompts, completions)
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        if bad:
            kinds = ", ".join(sorted({str(v) for v in values[bad]}))
            raise RewardError(
                "The reward is not finite.",
                where=self.name,
                got=f"{kinds} for {len(bad)} of {len(values)} completions: "
                + cases([prompts[i] for i in bad], [completions[i] for i in bad]),
                expected="a finite number for each completion",
                todo="Give such completions a number of their own, such as 0.",
            )
        return values

    def _values(
        self, answer: object, prompts: Sequence[Content], completions: Sequence[str]
    ) -> Float64[np.ndarray, " completions"]:
        """`answer` as float64, once it has the right form."""
        if isinstance(answer, torch.Tensor):
            answer = answer.detach().double().cpu().numpy()
        try:
            values: np.ndarray | None = np.asarray(answer)
        except (TypeError, ValueError, RuntimeError):  # ragged, or elements that are no numbers
            values = None
        if values is None or values.dtype.kind not in "biuf" or values.shape != (len(completions),):
            raise RewardError(
                "The reward does not give a number for each completion.",
                where=self.name,
                got=f"{_form(answer, values)} for {len(completions)} completions: {cases(prompts, completions)}",
                expected=f"a list, array or tensor of {len(completions)} numbers",
            )
        return values.astype(np.float64)


def cases(prompts: Sequence[Content], completions: Sequence[str]) -> str:
    """The first prompts and completions, shortened, for a message."""
    shown = [f"{_prompt(p)} -> {_short(c)}" for p, c in zip(prompts[:_SHOWN], completions, strict=False)]
    more = len(prompts) - len(shown)
    return "; ".join(shown) + (f"; and {more:,} more" if more else "")


def _prompt(prompt: Content) -> str:
    if isinstance(prompt, str):
        return _short(prompt)
    return f"{prompt[-1].role}: {_short(prompt[-1].content)}" if prompt else "(no turn)"


def _short(text: str) -> str:
    return repr(text if len(text) <= _WIDEST else f"{text[: _WIDEST // 2]} ... {text[-_WIDEST // 2 :]}")


def _form(answer: object, values: np.ndarray | None) -> str:
    kind = type(answer).__name__
    if values is None or values.dtype.kind not in "biuf":
        return f"{kind} {answer!r:.80}"
    if values.ndim == 0:
        return "a single number"
    if values.ndim == 1:
        return f"{len(values)} numbers"
    return f"{kind} of shape {values.shape}"
