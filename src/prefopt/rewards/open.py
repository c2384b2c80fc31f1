"""From what the user wrote to a reward."""

import re
from pathlib import Path

import torch

from prefopt.errors import RewardError
from prefopt.rewards.builtin import BUILTINS
from prefopt.rewards.function import function_reward
from prefopt.rewards.reward import Reward

__all__ = ["open_reward"]

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def open_reward(spec: str, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Reward:
    """The reward that `spec` names.

    One of `sentiment:LEXICON`, `length:WORDS`, `regex:PATTERN` (`rewards.builtin`), a Python function
    `package.module:function` (`rewards.function`), or a reward model: its folder, run folder or hub name.

    Args:
        device: Of a reward model, like `dtype`; others compute nothing there.

    Raises:
        RewardError: it is none of these, or one that cannot be used.
        ModelError: the reward model cannot be used.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or Path(spec).exists():
        return _model_reward(spec, device, dtype)
    if kind in BUILTINS:
        return BUILTINS[kind](rest)
    if _FUNCTION.fullmatch(spec):
        return function_reward(spec)
    raise RewardError(
        "This is not a reward.",
        where="reward",
        got=spec,
        expected=f"{':..., '.join(BUILTINS)}:..., package.module:function, or a reward model's folder",
    )


def _model_reward(spec: str, device: torch.device, dtype: torch.dtype) -> Reward:
    from prefopt.model.reward import load_reward_model  # brings transformers along

    model = load_reward_model(spec, dtype=dtype, device=device)
    return Reward(spec, model.fingerprint, model.score, model.tokenizer_fingerprint)
