"""One frozen model per recipe: the single source of flags, YAML keys, bounds and help.

A field's description is the sentence `--help` prints. Nothing edits a configuration once it is
parsed; the resolved copy is saved in the run folder.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from prefopt.objectives import MOVABLE, Rows, Term, needs_beta, terms_of

__all__ = [
    "ChatConfig",
    "CheckConfig",
    "DPOConfig",
    "DataConfig",
    "MergeConfig",
    "QuickstartConfig",
    "ResumeConfig",
    "RowsConfig",
    "SFTConfig",
    "ScoreConfig",
    "TrainConfig",
]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind not in (bool, bool | None):  # pydantic takes true for 1
            raise ValueError("a value that is neither true nor false (in YAML yes, no, on and off mean these, too)")
        if isinstance(value, str) and info.field_name in ("data", "lora_targets"):
            return (value,)
        if value == "auto" and info.field_name == "tokens_per_batch":
            return None
        return value


class QuickstartConfig(_Config):
    """The whole story on a tiny model made on the spot."""

    out: Annotated[Path, Field(description="Folder to make.")] = Path("runs/quickstart")
    seed: Annotated[int, Field(description="Seeds everything.", ge=0)] = 0


class ResumeConfig(_Config):
    """An interrupted run to finish."""

    run: Annotated[Path, Field(description="Run folder of an interrupted `prefopt sft` or `prefopt dpo`.")]


class MergeConfig(_Config):
    """A LoRA adapter to write into plain weights."""

    adapter: Annotated[Path, Field(description="Adapter folder, or the run folder it was trained in.")]
    out: Annotated[Path, Field(description="Model folder to make.")]


class ChatConfig(_Config):
    """A conversation at the terminal."""

    model: Annotated[str, Field(description="Model folder, run folder or hub name.")]
    system: Annotated[str | None, Field(description="What the model is told before the conversation.")] = None
    temperature: Annotated[float, Field(description="0: always the likeliest token.", ge=0)] = 0.7
    max_new_tokens: Annotated[int, Field(description="Length limit of an answer.", ge=1)] = 512
    seed: Annotated[int | None, Field(description="Makes the answers repeatable.", ge=0)] = None
    template: Annotated[
        Literal["auto", "chat", "plain"],
        Field(
            description="chat: the model's chat template; plain: Human:/Assistant: text; auto: chat if there is one."
        ),
    ] = "auto"


class RowsConfig(_Config):
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


class CheckConfig(RowsConfig):
    """The data doctor: what becomes of every row, without training."""

    model: Annotated[
        str | None, Field(description="Count what this model's tokens decide, too: cut and too long rows.")
    ] = None

    @model_validator(mode="after")
    def _tokens_need_a_model(self) -> "CheckConfig":
        for name in ("template", "max_length", "max_prompt_length"):
            if self.model is None and name in self.model_fields_set:
                raise ValueError(f"{name} does nothing without model")
        return self


class DataConfig(RowsConfig):
    """A model, and rows for it."""

    model: Annotated[str, Field(description="Model folder (transformers format, safetensors) or hub name.")]
    max_refused: Annotated[
        float, Field(description="Stop when more than this share of the rows is refused.", ge=0, le=1)
    ] = 0.2


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
    samples: Annotated[int, Field(description="Held-out prompts completed before and after, for the report.", ge=0)] = 6
    sample_tokens: Annotated[int, Field(description="Length limit of those completions.", ge=1)] = 96

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
        if self._changed("sample_tokens") and not self.samples:
            raise ValueError("sample_tokens does nothing with samples 0")
        return self


class SFTConfig(TrainConfig):
    """Supervised fine-tuning: maximise the log-likelihood of demonstrations."""

    batch_rows: Annotated[int, Field(description="Rows in an optimiser step.", ge=1)] = 32
    lr: Annotated[float, Field(description="Peak learning rate.", gt=0)] = 2e-5
    max_grad_norm: Annotated[float, Field(description="Gradient norm is clipped to this.", gt=0)] = 1.0


_DPO: tuple[dict[str, Any], ...] = ({"name": "dpo"},)


class DPOConfig(TrainConfig):
    """Direct Preference Optimization."""

    loss: Annotated[
        tuple[dict[str, Any], ...] | None,
        Field(description="Objective, or several as NAME=WEIGHT (see docs/losses.md); default: dpo.", min_length=1),
    ] = None
    beta: Annotated[
        float | None,
        Field(
            description="Strength of the pull to the reference; no default: 0.1 is the paper's. Optional without one.",
            gt=0,
            validate_default=True,
        ),
    ] = None
    label_smoothing: Annotated[
        float | None, Field(description="Probability that a pair's label is wrong; default: none.", ge=0, lt=0.5)
    ] = None
    loss_options: Annotated[
        dict[str, Any] | None, Field(description="Further parameters of the objective, e.g. gamma=0.5.", min_length=1)
    ] = None
    pair_weights: Annotated[
        Literal["given", "wpo"],
        Field(description="given: the rows' own; wpo: less, too, for what the policy would hardly write."),
    ] = "given"
    reference: Annotated[str | None, Field(description="Reference model folder; default: the starting model.")] = None
    move_reference_every: Annotated[
        int | None, Field(description="Move the reference to the policy after so many steps (TR-DPO).", ge=1)
    ] = None
    move_reference_share: Annotated[
        float, Field(description="How far it moves; 1: it becomes the policy.", gt=0, le=1)
    ] = 1.0
    batch_pairs: Annotated[int, Field(description="Pairs in an optimiser step.", ge=1)] = 64
    lr: Annotated[float, Field(description="Peak learning rate.", gt=0)] = 1e-6
    max_grad_norm: Annotated[float, Field(description="Gradient norm is clipped to this.", gt=0)] = 10.0
    kl_rows: Annotated[
        int, Field(description="Held-out pairs on which the exact KL to the reference is measured.", ge=0)
    ] = 32

    @field_validator("loss", mode="before")
    @classmethod
    def _loss_as_terms(cls, value: Any) -> Any:
        if value is None:
            return value
        terms = [value] if isinstance(value, str | dict) else value
        if not isinstance(terms, list | tuple) or not all(isinstance(term, str | dict) for term in terms):
            raise ValueError("a name, or a list of names and of mappings with a name")
        return tuple(_term_as_written(term) for term in terms)

    @field_validator("beta")
    @classmethod
    def _beta_where_there_is_a_reference(cls, value: float | None, info: Any) -> float | None:
        if value is None and "loss" in info.data and any(map(needs_beta, info.data["loss"] or _DPO)):
            raise PydanticCustomError("missing", "beta is missing")
        return value

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the loss with their parameters."""
        flat = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        common = {k: v for k, v in flat.items() if v is not None}
        for name, value in (self.loss_options or {}).items():
            if name in ("beta", "label_smoothing", "weight", "name"):
                raise ValueError(f"loss_options is not the place of {name}: it is a setting of its own")
            common[name] = value
        try:
            return terms_of(self.loss or _DPO, common)
        except ValueError as error:
            if str(error).startswith(tuple(self.loss_options or ())):
                raise ValueError(f"loss_options {error}") from None
            raise

    @property
    def over(self) -> Rows:
        """What rows the loss is over."""
        return self.terms[0].rows

    @model_validator(mode="after")
    def _every_parameter_has_an_effect(self) -> "DPOConfig":
        terms = self.terms  # raises what is wrong with the loss itself
        if self._changed("move_reference_share") and self.move_reference_every is None:
            raise ValueError("move_reference_share does nothing without move_reference_every")
        if self.move_reference_every is not None:
            if self.lora_rank is not None:
                raise ValueError("move_reference_every cannot be had with lora_rank: an adapter's base stays as it is")
            names = " + ".join(term.name for term in terms)
            if not any(term.name in MOVABLE for term in terms) or "ld_dpo" in names:
                raise ValueError(
                    f"move_reference_every cannot be had with loss {names}; it is for {', '.join(MOVABLE)}"
                )
        if self.pair_weights == "wpo":
            for term in terms:
                if term.rows != "pairs" or not term.weighted:
                    raise ValueError(
                        f"pair_weights wpo does nothing with loss {term.name}, which has no weights of pairs"
                    )
        return self

    @model_validator(mode="after")
    def _kl_needs_held_out_pairs(self) -> "DPOConfig":
        if self.kl_rows and self._changed("kl_rows") and not self.eval_share:
            raise ValueError("kl_rows does nothing with eval_share 0")
        return self


def _term_as_written(term: Any) -> Any:
    """`simpo` and `sft=0.2`, as on the command line, as the mapping that a file has."""
    if not isinstance(term, str):
        return term
    name, equals, weight = term.partition("=")
    return {"name": name, "weight": weight} if equals else {"name": name}


class ScoreConfig(DataConfig):
    """Log-probabilities of completions, and implicit rewards against a reference."""

    out: Annotated[Path, Field(description="File of JSON lines to write.")]
    reference: Annotated[str | None, Field(description="Reference model folder; adds rewards.")] = None
    beta: Annotated[float | None, Field(description="Rewards are beta * log-ratio; default: 1.", gt=0)] = None
    tokens_per_batch: Annotated[
        int | None, Field(description="Token budget of a forward pass; default: auto, what memory takes.", ge=64)
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Field(description="Arithmetic; auto: bfloat16 on CUDA, else float32.")
    ] = "auto"

    @model_validator(mode="after")
    def _beta_has_effect(self) -> "ScoreConfig":
        if self.beta is not None and self.reference is None:
            raise ValueError("beta does nothing without reference")
        return self
