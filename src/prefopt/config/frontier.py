"""What `prefopt evaluate frontier` compares: methods with swept settings, from one start, under one reward."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from prefopt.config.base import Config, TrainConfig
from prefopt.config.recipes import DPOConfig, SFTConfig

__all__ = ["Arm", "EvaluationConfig", "FrontierConfig", "MethodConfig", "PairsConfig", "PromptsConfig"]

_TRAINED = ("sft", "dpo", "ppo")
_ALL_CHECKPOINTS = 1_000_000
_GIVEN = (
    "model",
    "data",
    "out",
    "seed",
    "reward",
    "keep_checkpoints",
    "max_new_tokens",
    "temperature",
)  # what the experiment sets by itself


class PromptsConfig(Config):
    """Where prompts come from, and how many are trained on and measured on."""

    data: Annotated[tuple[str, ...], Field(description="Texts to take beginnings of, or rows with prompts.")]
    words: Annotated[int | None, Field(description="A prompt is this many first words of a text.", ge=1)] = None
    tokens: Annotated[
        tuple[int, int] | None,
        Field(description="A prompt is the first tokens of a text, as many as drawn between these two numbers."),
    ] = None
    train: Annotated[int, Field(description="Prompts that pairs and PPO's samples come from.", ge=1)]
    test: Annotated[int, Field(description="Other prompts, that every point is measured on.", ge=2)]

    @model_validator(mode="after")
    def _one_kind_of_beginning(self) -> "PromptsConfig":
        if self.words is not None and self.tokens is not None:
            raise ValueError("words and tokens both say how long a prompt is; give one of them")
        if self.tokens is not None and not 1 <= self.tokens[0] <= self.tokens[1]:
            raise ValueError("tokens has to be two numbers, 1 or more, the smaller one first")
        return self


class PairsConfig(Config):
    """Pairs to train on: a file, or all pairs of several samples of the start, labelled by the true reward."""

    data: Annotated[tuple[str, ...] | None, Field(description="Preference files to use as they are.")] = None
    samples: Annotated[int | None, Field(description="Samples of each training prompt.", ge=2)] = None
    max_new_tokens: Annotated[int, Field(description="Longest sample, tokens.", ge=1)] = 64

    @model_validator(mode="after")
    def _a_file_or_samples(self) -> "PairsConfig":
        if (self.data is None) == (self.samples is None):
            raise ValueError("data or samples is needed, and not both: a preference file, or samples to make pairs of")
        if self.data is not None and "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_new_tokens does nothing with data")
        return self


class EvaluationConfig(Config):
    """How a point is measured."""

    samples: Annotated[int, Field(description="Fresh samples of each test prompt.", ge=1)] = 4
    max_new_tokens: Annotated[int, Field(description="Longest sample, tokens.", ge=1)] = 64
    every: Annotated[
        int, Field(description="Optimiser steps between measured checkpoints; a method's save_every wins.", ge=1)
    ] = 100
    max_kl: Annotated[
        float | None,
        Field(description="Where areas and plot end, nats; default: the largest KL that two methods reach.", gt=0),
    ] = None
    keep_checkpoints: Annotated[bool, Field(description="Keep checkpoints that are measured; else only the last.")] = (
        True
    )


@dataclass(frozen=True)
class Arm:
    """One setting of a method: what becomes one run for each seed.

    Attributes:
        label: The swept settings for people, "beta 0.1"; "" where nothing is swept.
        folder: Name of its run folder.
        settings: Of the recipe, swept ones included.
    """

    method: "MethodConfig"
    label: str
    folder: str
    settings: dict[str, Any]

    def training_config(
        self,
        experiment: "FrontierConfig",
        seed: int,
        *,
        model: str,
        pairs: tuple[str, ...],
        prompts: str,
        learned: str,
        out: Path,
    ) -> TrainConfig:
        """What its recipe is called with.

        Args:
            model: The start.
            pairs: Preference files; of sft and dpo.
            prompts: File of prompts; of ppo.
            learned: Reward-model folder.
            out: Run folder.
        """
        assert self.method.recipe is not None
        given: dict[str, Any] = {"model": model, "data": pairs, "out": out, "seed": seed, "samples": 0}
        given |= {"keep_checkpoints": _ALL_CHECKPOINTS, "save_every": experiment.evaluate.every}
        if self.method.recipe == "ppo":
            reward = learned if self.method.reward == "learned" else experiment.reward
            tokens = experiment.evaluate.max_new_tokens
            given |= {"data": (prompts,), "reward": reward, "max_new_tokens": tokens}
        return _kind(self.method.recipe).model_validate({**given, **self.settings})


class MethodConfig(Config):
    """A method: a recipe with settings, Best-of-N, or runs that are there already."""

    name: Annotated[str, Field(description="What table and plot call it.", min_length=1)]
    recipe: Annotated[
        Literal["sft", "dpo", "ppo", "best_of_n"] | None, Field(description="How its policies are made.")
    ] = None
    reward: Annotated[
        Literal["truth", "learned"] | None, Field(description="What ppo and best_of_n optimise.", validate_default=True)
    ] = None
    settings: Annotated[dict[str, Any], Field(description="Settings of the recipe, by name.")] = {}
    sweep: Annotated[
        dict[str, list[Any]], Field(description="Settings with several values each: one run for every combination.")
    ] = {}
    n: Annotated[tuple[int, ...] | None, Field(description="best_of_n: how many samples the best is taken of.")] = None
    samples: Annotated[
        int | None, Field(description="best_of_n: samples of each prompt, among which all choices of n are counted.")
    ] = None
    runs: Annotated[tuple[Path, ...] | None, Field(description="Run folders to measure.", min_length=1)] = None

    @model_validator(mode="after")
    def _what_belongs_together(self) -> "MethodConfig":
        if (self.recipe is None) == (self.runs is None):
            raise ValueError("recipe or runs is needed, and not both")
        if (self.reward is None) == (self.recipe in ("ppo", "best_of_n")):
            raise ValueError("reward, truth or learned, belongs to ppo and best_of_n")
        if (self.n is None) == (self.recipe == "best_of_n") or self.n is not None and min(self.n, default=0) < 1:
            raise ValueError("n, a list of numbers from 1 on, belongs to best_of_n")
        if self.samples is not None and (self.n is None or self.samples < max(self.n)):
            raise ValueError("samples belongs to best_of_n, and has to be the largest n or more")
        if self.recipe not in _TRAINED and (self.settings or self.sweep):
            raise ValueError("settings and sweep belong to sft, dpo and ppo")
        if self.runs is not None and len({run.name for run in self.runs}) < len(self.runs):
            raise ValueError("runs has two folders of the same name, which table and plot could not tell apart")
        return self

    @property
    def arms(self) -> list[Arm]:
        """Every combination of swept values; `loss_options.alpha` sets one option of the loss."""
        found = []
        for values in product(*self.sweep.values()):
            chosen = dict(zip(self.sweep, values, strict=True))
            settings = dict(self.settings)
            for name, value in chosen.items():
                outer, dot, inner = name.partition(".")
                settings[outer] = {**settings.get(outer, {}), inner: value} if dot else value
            label = ", ".join(f"{name.rpartition('.')[2]} {_written(v)}" for name, v in chosen.items())
            found.append(Arm(self, label, _slug(f"{self.name} {label}"), settings))
        return found


class FrontierConfig(Config):
    """Reward against KL, for several methods that begin at the same model."""

    out: Annotated[Path, Field(description="Folder of all runs, points, table and plot.")]
    model: Annotated[str, Field(description="Model folder or hub name where everything begins.")]
    reward: Annotated[
        str, Field(description="The truth that measures every method: package.module:function, sentiment:FILE, ...")
    ]
    seeds: Annotated[tuple[int, ...], Field(description="Everything is done once for each.", min_length=1)] = (0, 1, 2)
    start: Annotated[
        dict[str, Any] | None,
        Field(description="Settings of an SFT of the model, one a seed, that all methods then begin at."),
    ] = None
    prompts: Annotated[PromptsConfig, Field(description="Prompts to train and to measure on.")]
    pairs: Annotated[PairsConfig | None, Field(description="Pairs to train on.")] = None
    reward_model: Annotated[
        dict[str, Any] | None, Field(description="Settings of the reward model of methods with a learned reward.")
    ] = None
    evaluate: Annotated[EvaluationConfig, Field(description="How points are measured.")] = EvaluationConfig()
    methods: Annotated[tuple[MethodConfig, ...], Field(description="What is compared.", min_length=1)]

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("different numbers, 0 or more")
        return value

    @field_validator("methods")
    @classmethod
    def _methods_with_folders_of_their_own(cls, value: tuple[MethodConfig, ...]) -> tuple[MethodConfig, ...]:
        names = [method.name for method in value]
        if len(set(names)) < len(names):
            raise ValueError("methods need different names")
        taken = [name for name in names if _slug(name) in ("start", "reward-model", "")]
        if taken:
            raise ValueError(
                f"methods need names with letters or digits, and none of the experiment's own: {taken[0]!r}"
            )
        arms = [arm for method in value if method.recipe in _TRAINED for arm in method.arms]
        for one, other in combinations(arms, 2):
            if one.folder == other.folder:
                raise ValueError(f"methods need different run folders; two settings would both have {one.folder}")
        return value

    @property
    def learns_reward(self) -> bool:
        """Whether any method optimises a learned reward."""
        return any(method.reward == "learned" for method in self.methods)

    @property
    def needs_pairs(self) -> bool:
        """Whether anything is trained on pairs."""
        return self.learns_reward or any(method.recipe in ("sft", "dpo") for method in self.methods)

    def start_config(self, seed: int, out: Path) -> SFTConfig:
        """The SFT that makes the start."""
        given = {"model": self.model, "out": out, "seed": seed, "samples": 0}
        return SFTConfig.model_validate({**given, **(self.start or {})})

    def reward_config(self, seed: int, *, model: str, pairs: tuple[str, ...], out: Path) -> TrainConfig:
        """The training of the reward model."""
        from prefopt.config.recipes import RewardConfig

        given = {"model": model, "data": pairs, "out": out, "seed": seed}
        return RewardConfig.model_validate({**given, **(self.reward_model or {})})

    @model_validator(mode="after")
    def _parts_that_are_needed_and_no_others(self) -> "FrontierConfig":
        if self.needs_pairs != (self.pairs is not None):
            what = "pairs is missing: methods are trained on them" if self.needs_pairs else "pairs does nothing here"
            raise ValueError(what)
        if self.reward_model is not None and not self.learns_reward:
            raise ValueError("reward_model does nothing where no method has reward learned")
        return self

    @model_validator(mode="after")
    def _settings_of_recipes(self) -> "FrontierConfig":
        """Every run's settings are judged before the first one is trained."""
        if self.start is not None:
            _judge(("start",), self.start, lambda: self.start_config(0, self.out), free="data")
        if self.learns_reward:
            build = partial(self.reward_config, 0, model="m", pairs=("p",), out=self.out)
            _judge(("reward_model",), self.reward_model or {}, build)
        for i, method in enumerate(self.methods):
            for arm in method.arms if method.recipe in _TRAINED else ():
                made = partial(arm.training_config, self, 0, model="m", pairs=("p",), prompts="q", learned="r")
                build = partial(made, out=self.out)
                _judge(("methods", i), arm.settings, build, swept={n.partition(".")[0]: n for n in method.sweep})
        return self


def _judge(
    place: tuple[str | int, ...],
    settings: Mapping[str, Any],
    build: Callable[[], object],
    *,
    swept: Mapping[str, str] | None = None,
    free: str | None = None,
) -> None:
    """Build a recipe's configuration; what is wrong with it is told as of this file.

    Args:
        place: Where the settings stand.
        swept: Of a method: the settings that are swept, each with its name in `sweep`.
        free: A setting that is not the experiment's to set here.

    Raises:
        PydanticCustomError: at the place of the setting.
    """

    def complain(name: str, expected: str) -> PydanticCustomError:
        inner: tuple[str, ...] = (name,) if name in settings else ()
        if swept is not None:
            inner = ("sweep", swept[name]) if name in swept else ("settings", *inner)
        return PydanticCustomError("inside", "{expected}", {"expected": expected, "inside": [*place, *inner]})

    for name in settings:
        if name in _GIVEN and name != free:
            raise complain(name, f"no {name}: the experiment sets it")
    try:
        build()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing":
            raise complain(name, f"{name}, too, which has no default") from None
        if first["type"] == "extra_forbidden":
            raise complain(name, f"a setting of the recipe; {name} is none") from None
        raise complain(name, first["msg"].removeprefix("Value error, ")) from None


def _kind(recipe: str) -> type[TrainConfig]:
    if recipe == "ppo":
        from prefopt.config.recipes import PPOConfig

        return PPOConfig
    return SFTConfig if recipe == "sft" else DPOConfig


def _slug(name: str) -> str:
    """As a folder is called."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
