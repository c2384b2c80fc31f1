"""Points of reward and KL in a file that a kill cannot harm: whole lines, each under a key of what it measured."""

import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from prefopt.run import append_line, read_lines

__all__ = ["Point", "PointsFile", "content_key", "standard_error"]


def content_key(**parts: Any) -> str:
    """A name for exactly these things: hex, the same for equal content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def standard_error(per_prompt: Float64[np.ndarray, " prompts"]) -> float:
    """Of the mean over prompts."""
    return float(per_prompt.std(ddof=1) / len(per_prompt) ** 0.5)


@dataclass(frozen=True)
class Point:
    """A policy on the test prompts.

    Attributes:
        key: Of what was measured and how.
        setting: The swept settings, for people.
        step: Optimiser steps of the checkpoint; 0 where nothing is trained.
        run: Run folder, or "" where there is none.
        reward: Mean true reward of a prompt's samples.
        kl: Mean sequence KL to the start along them, nats; for Best-of-N a bound of it.
        tokens: Mean length of a sample.
        bound: Whether `kl` is a bound.
    """

    key: str
    method: str
    setting: str
    seed: int
    step: int
    run: str
    reward: Float64[np.ndarray, " prompts"]
    kl: Float64[np.ndarray, " prompts"]
    tokens: float
    bound: bool = False

    def line(self) -> dict[str, Any]:
        """As it stands in points.jsonl: means with their standard errors over prompts, then every prompt."""
        means = {"reward": float(self.reward.mean()), "reward_se": standard_error(self.reward)}
        means |= {"kl": float(self.kl.mean()), "kl_se": standard_error(self.kl), "tokens": self.tokens}
        names = ("method", "setting", "seed", "step", "run", "key", "bound")
        prompts = {"reward_by_prompt": self.reward.tolist(), "kl_by_prompt": self.kl.tolist()}
        return {**{name: getattr(self, name) for name in names}, **means, **prompts}

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Point":
        """What `line` made."""
        names = ("method", "setting", "seed", "step", "run", "key", "bound", "tokens")
        reward, kl = (np.array(line[f"{name}_by_prompt"], dtype=np.float64) for name in ("reward", "kl"))
        return cls(**{name: line[name] for name in names}, reward=reward, kl=kl)


@dataclass(frozen=True)
class PointsFile:
    """points.jsonl; several processes may append to it."""

    path: Path

    def read(self) -> dict[str, Point]:
        """Every point by its key; a line torn by a kill is left out.

        Raises:
            RunError: a whole line cannot be read; it is named.
        """
        return {line["key"]: Point.of(line) for line in read_lines(self.path)}

    def append(self, point: Point) -> None:
        """Keep one more point."""
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            append_line(self.path, point.line())
