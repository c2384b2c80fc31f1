"""One frozen model per recipe: the single source of flags, YAML keys, bounds and help.

A field's description is the sentence `--help` prints. Nothing edits a configuration once it is
parsed; the resolved copy is saved in the run folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prefopt.errors import ConfigError

__all__ = ["DPOConfig", "DataConfig", "SFTConfig", "TrainConfig", "parse_config"]


class DataConfig(BaseModel):
    """Which rows, and how they become tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(description="Model folder (transformers format, safetensors) or hub name.")]
    data: Annotated[
        tuple[str, ...],
        Field(description="Data files, dataset folders or hub names; give several to use them together.", min_length=1),
    ]
    columns: Annotated[
        dict[str, str] | None,
        Field(description="Column mapping for an unknown layout, e.g. prompt=question chosen=best rejected=worst."),
    ] = None
    split: Annotated[str | None, Field(description="Split of a dataset folder or hub dataset; needed if several.")] = (
        None
    )
    template: Annotated[
        Literal["auto", "chat", "plain"],
        Field(description="chat: the model's chat template; plain: text as it stands; auto: chat where there is one."),
    ] = "auto"
    max_length: Annotated[
        int | None,
        Field(description="Tokens of prompt plus completion; default: 1024 or what the model holds, if less.", ge=8),
    ] = None
    max_prompt_length: Annotated[
        int | None,
        Field(description="Where a row is too long its prompt keeps this many last tokens; default: half.", ge=1),
    ] = None
    max_refused: Annotated[
        float, Field(description="Stop when more than this share of the rows is refused.", ge=0, le=1)
    ] = 0.2
    seed: Annotated[int, Field(description="Seeds order, split, new weights and sampling.", ge=0)] = 0

    @model_validator(mode="after")
    def _prompt_fits(self) -> Self:
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, or no completion token is left")
        return self


class TrainConfig(DataConfig):
    """What every training recipe shares."""

    out: Annotated[Path, Field(description="Run folder to make.")]
    epochs: Annotated[int, Field(description="Passes over the training rows.", ge=1)] = 1
    max_steps: Annotated[int | None, Field(description="Stop after this many optimiser steps.", ge=1)] = None
    tokens_per_batch: Annotated[
        int, Field(description="Token budget of a micro-batch: memory only, never the result.", ge=64)
    ] = 8192
    optimizer: Annotated[Literal["adamw", "rmsprop"], Field(description="Optimiser.")] = "adamw"
    weight_decay: Annotated[float, Field(description="Decoupled weight decay (adamw).", ge=0)] = 0.0
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], Field(description="Learning rate after the warm-up.")
    ] = "linear"
    warmup: Annotated[
        float, Field(description="Warm-up: a share of all steps if below 1, else a number of steps.", ge=0)
    ] = 0.1
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Arithmetic; bfloat16 keeps a float32 master copy. auto: bfloat16 on CUDA, else float32."),
    ] = "auto"
    checkpoint_activations: Annotated[
        bool, Field(description="Recompute activations in the backward pass: less memory, about a fifth slower.")
    ] = False
    lora_rank: Annotated[int | None, Field(description="Train a LoRA adapter of this rank.", ge=1)] = None
    lora_alpha: Annotated[int | None, Field(description="LoRA scale; default: the rank.", ge=1)] = None
    lora_dropout: Annotated[float | None, Field(description="LoRA dropout; default: none.", ge=0, lt=1)] = None
    lora_targets: Annotated[
        tuple[str, ...] | None, Field(description="Module names that get an adapter; default: every linear layer.")
    ] = None
    eval_share: Annotated[float, Field(description="Share of the prompts held out for evaluation.", ge=0, lt=1)] = 0.05
    eval_every: Annotated[
        int | None, Field(description="Steps between evaluations; default: five in a run, first and last always.", ge=1)
    ] = None
    save_every: Annotated[
        int | None, Field(description="Steps between checkpoints; default: five in a run; the last always.", ge=1)
    ] = None
    keep_checkpoints: Annotated[int, Field(description="How many checkpoints stay on disk.", ge=1)] = 2
    samples: Annotated[int, Field(description="Held-out prompts completed before and after, for the report.", ge=0)] = 6
    sample_tokens: Annotated[int, Field(description="Length limit of those completions.", ge=1)] = 96

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> Self:
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does nothing without lora_rank")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError("weight_decay does nothing with optimizer rmsprop; use adamw or leave it out")
        if self.eval_every and not self.eval_share:
            raise ValueError("eval_every does nothing with eval_share 0")
        if "sample_tokens" in self.model_fields_set and not self.samples:
            raise ValueError("sample_tokens does nothing with samples 0")
        return self


class SFTConfig(TrainConfig):
    """Supervised fine-tuning: maximise the log-likelihood of demonstrations."""

    batch_rows: Annotated[int, Field(description="Rows in an optimiser step.", ge=1)] = 32
    lr: Annotated[float, Field(description="Peak learning rate.", gt=0)] = 2e-5
    max_grad_norm: Annotated[float, Field(description="Gradient norm is clipped to this.", gt=0)] = 1.0


class DPOConfig(TrainConfig):
    """Direct Preference Optimization."""

    beta: Annotated[
        float, Field(description="Strength of the pull to the reference; no default: 0.1 is the paper's.", gt=0)
    ]
    loss: Annotated[Literal["dpo"], Field(description="Objective.")] = "dpo"
    label_smoothing: Annotated[
        float, Field(description="Probability that a pair's label is wrong (conservative DPO).", ge=0, lt=0.5)
    ] = 0.0
    reference: Annotated[str | None, Field(description="Reference model folder; default: the starting model.")] = None
    batch_pairs: Annotated[int, Field(description="Pairs in an optimiser step.", ge=1)] = 64
    lr: Annotated[float, Field(description="Peak learning rate.", gt=0)] = 1e-6
    max_grad_norm: Annotated[float, Field(description="Gradient norm is clipped to this.", gt=0)] = 10.0
    kl_rows: Annotated[
        int, Field(description="Held-out pairs on which the exact KL to the reference is measured.", ge=0)
    ] = 32


def parse_config(kind: type[C], file: Path | None, flags: Mapping[str, Any]) -> C:
    """A configuration from a YAML file and flags; flags win.

    Raises:
        ConfigError: unreadable file, unknown or missing key, value out of bounds, option without
            effect; names the file's key or the flag.
    """
    raise NotImplementedError
