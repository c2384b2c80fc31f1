"""What several commands share: how a setting is read, rows, a model, a training run."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["Config", "DataConfig", "PolicyConfig", "RowsConfig", "TrainConfig", "UsableRowsConfig"]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind not in (bool, bool | None):  # pydantic takes true for 1
            raise ValueError("a value that is neither true nor false (in YAML yes, no, on and off mean these, too)")
        if isinstance(value, str) and info.field_name in ("data", "lora_targets", "prompts", "against"):
            return (value,)
        if value == "auto" and info.field_name == "tokens_per_batch":
            return None
        return value


class RowsConfig(Config):
    """Which rows, and how they become tokens."""

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

    @model_validator(mode="after")
    def _prompt_fits(self) -> "RowsConfig":
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, or no completion token is left")
        return self

    def _changed(self, name: str) -> bool:
        # Not `model_fields_set`: in a configuration saved with a run every field is set.
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class UsableRowsConfig(RowsConfig):
    """Rows most of which have to be usable."""

    max_refused: Annotated[
        float, Field(description="Stop when more than this share of the rows is refused.", ge=0, le=1)
    ] = 0.2


class DataConfig(UsableRowsConfig):
    """A model, and rows for it."""

    model: Annotated[str, Field(description="Model folder (transformers format, safetensors) or hub name.")]


class TrainConfig(DataConfig):
    """What every training recipe shares."""

    seed: Annotated[int, Field(description="Seeds order, split, new weights and sampling.", ge=0)] = 0
    out: Annotated[Path, Field(description="Run folder to make.")]
    epochs: Annotated[int, Field(description="Passes over the training rows.", ge=1)] = 1
    max_steps: Annotated[int | None, Field(description="Stop after this many optimiser steps.", ge=1)] = None
    tokens_per_batch: Annotated[
        int | None,
        Field(
            description="Token budget of a micro-batch, never the result; default: auto, what memory takes.",
            ge=64,
        ),
    ] = None
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
        Literal["none", "selective", "all"],
        Field(description="Activations to recompute in the backward pass: less memory, slower; selective: cheap ones."),
    ] = "none"
    compile_blocks: Annotated[
        bool | None, Field(description="Compile transformer blocks; default: on CUDA, in runs of 100 steps and more.")
    ] = None
    lora_rank: Annotated[int | None, Field(description="Train a LoRA adapter of this rank.", ge=1)] = None
    lora_alpha: Annotated[int | None, Field(description="LoRA scale; default: the rank.", ge=1)] = None
    lora_dropout: Annotated[float | None, Field(description="LoRA dropout; default: none.", ge=0, lt=1)] = None
    lora_targets: Annotated[
        tuple[str, ...] | None,
        Field(description="Module names that get an adapter; default: every linear layer but the head."),
    ] = None
    eval_share: Annotated[float, Field(description="Share of the prompts held out for evaluation.", ge=0, lt=1)] = 0.05
    eval_every: Annotated[
        int | None, Field(description="Steps between evaluations; default: five in a run, first and last always.", ge=1)
    ] = None
    save_every: Annotated[
        int | None, Field(description="Steps between checkpoints; default: five in a run; the last always.", ge=1)
    ] = None
    keep_checkpoints: Annotated[int, Field(description="How many checkpoints stay on disk.", ge=1)] = 2

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> "TrainConfig":
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does nothing without lora_rank")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError("weight_decay does nothing with optimizer rmsprop; use adamw or leave it out")
        if self.eval_every and not self.eval_share:
            raise ValueError("eval_every does nothing with eval_share 0")
        if self.checkpoint_activations == "selective" and self.compile_blocks:
            raise ValueError("checkpoint_activations selective does nothing with compile_blocks, which selects itself")
        return self


class PolicyConfig(TrainConfig):
    """What recipes share whose model writes."""

    samples: Annotated[int, Field(description="Held-out prompts completed before and after, for the report.", ge=0)] = 6
    sample_tokens: Annotated[int, Field(description="Length limit of those completions.", ge=1)] = 96

    @model_validator(mode="after")
    def _samples_have_tokens(self) -> "PolicyConfig":
        if self._changed("sample_tokens") and not self.samples:
            raise ValueError("sample_tokens does nothing with samples 0")
        return self
