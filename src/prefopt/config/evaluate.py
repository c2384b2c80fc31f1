"""The settings of what is measured on fresh samples."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefopt.config.base import Config

__all__ = ["BestOfConfig"]


class BestOfConfig(Config):
    """Best-of-N sampling under a reward, N swept."""

    model: Annotated[str, Field(description="Model folder, run folder or hub name to sample from.")]
    prompts: Annotated[
        tuple[str, ...], Field(description="Data files; the prompt of each row is taken, once.", min_length=1)
    ]
    reward: Annotated[
        str,
        Field(
            description="What chooses: sentiment:LEXICON, length:WORDS, regex:PATTERN, package.module:function,"
            " or a reward-model folder."
        ),
    ]
    true_reward: Annotated[
        str | None, Field(description="What the chosen ones are worth, named likewise; default: the reward itself.")
    ] = None
    n: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(description="How many to choose from.", min_length=1)]
    samples: Annotated[
        int | None, Field(description="Samples of each prompt that every N is worked out from; default: the most N.")
    ] = None
    max_new_tokens: Annotated[int, Field(description="Length limit of a sample.", ge=1)] = 128
    temperature: Annotated[float, Field(description="Of sampling.", gt=0)] = 1.0
    seed: Annotated[int, Field(description="Seeds sampling and intervals.", ge=0)] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Field(description="Arithmetic; auto: bfloat16 on CUDA, else float32.")
    ] = "auto"
    out: Annotated[Path, Field(description="JSON file to write.")]

    @model_validator(mode="after")
    def _enough_samples(self) -> "BestOfConfig":
        if self.samples is not None and self.samples < max(self.n):
            raise ValueError(f"samples must be at least {max(self.n)}, the most of n")
        return self
