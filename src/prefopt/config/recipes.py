"""The training recipes' own settings."""

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from prefopt.config.base import PolicyConfig, TrainConfig
from prefopt.objectives import MOVABLE, Rows, Term, needs_beta, terms_of

__all__ = ["DPOConfig", "PPOConfig", "RewardConfig", "SFTConfig"]


class SFTConfig(PolicyConfig):
    """Supervised fine-tuning: maximise the log-likelihood of demonstrations."""

    batch_rows: Annotated[int, Field(description="Rows in an optimiser step.", ge=1)] = 32
    lr: Annotated[float, Field(description="Peak learning rate.", gt=0)] = 2e-5
    max_grad_norm: Annotated[float, Field(description="Gradient norm is clipped to this.", gt=0)] = 1.0


class RewardConfig(TrainConfig):
    """A reward model: scores that rank completions as people do."""

    centering: Annotated[
        float, Field(description="Weight of (r_better + r_worse)^2, which holds rewards near zero; none: 0.", ge=0)
    ] = 0.0
    normalize: Annotated[
        Literal["shift", "scale", "none"],
        Field(
            description="shift: the training rows' best completions score 0 on average; scale: all of theirs have "
            "mean 0 and standard deviation 1; none: as trained."
        ),
    ] = "shift"
    batch_pairs: Annotated[int, Field(description="Pairs, or rankings, in an optimiser step.", ge=1)] = 64
    lr: Annotated[float, Field(description="Peak learning rate.", gt=0)] = 9e-6
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], Field(description="Learning rate after the warm-up.")
    ] = "cosine"
    max_grad_norm: Annotated[float, Field(description="Gradient norm is clipped to this.", gt=0)] = 1.0


_DPO: tuple[dict[str, Any], ...] = ({"name": "dpo"},)


class DPOConfig(PolicyConfig):
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


class PPOConfig(PolicyConfig):
    """Proximal policy optimisation against a reward."""

    reward: Annotated[
        str,
        Field(
            description="Reward-model folder, package.module:function, sentiment:FILE, length:WORDS or regex:PATTERN."
        ),
    ]
    reference: Annotated[str | None, Field(description="Reference model folder; default: the starting model.")] = None
    max_prompt_length: Annotated[
        int | None,
        Field(description="Longer prompts are refused, never cut; default: max_length less max_new_tokens.", ge=1),
    ] = None
    max_steps: Annotated[int | None, Field(description="Stop after this many batches of samples.", ge=1)] = None
    batch_prompts: Annotated[int, Field(description="Prompts that are sampled from before each update.", ge=1)] = 64
    completions: Annotated[int, Field(description="Samples of each of those prompts.", ge=1)] = 4
    max_new_tokens: Annotated[int, Field(description="Longest sample, tokens.", ge=1)] = 64
    temperature: Annotated[
        float, Field(description="Of sampling, and of every log-probability that is trained on.", gt=0)
    ] = 1.0
    kl_coef: Annotated[
        float, Field(description="Price of a nat of KL, in (normalized) reward; with target_kl where it starts.", ge=0)
    ] = 0.05
    target_kl: Annotated[
        float | None, Field(description="Adapt kl_coef so that a sequence's KL comes to this many nats.", gt=0)
    ] = None
    kl_horizon: Annotated[int, Field(description="Samples in which kl_coef may change by about e^0.2.", ge=1)] = 10_000
    max_kl: Annotated[
        float | None, Field(description="Stop the run when a sequence's KL is beyond this many nats.", gt=0)
    ] = None
    normalize_reward: Annotated[
        bool, Field(description="Shift and scale it so that samples of the starting model have mean 0 and sd 1.")
    ] = True
    missing_eos_reward: Annotated[
        float | None,
        Field(description="(Normalized) reward of a sample that does not end within max_new_tokens; default: its own."),
    ] = None
    whiten_rewards: Annotated[
        bool, Field(description="Scale each batch's rewards of tokens to variance 1; for samples of one length.")
    ] = False
    value_from: Annotated[
        Literal["policy", "reward"], Field(description="What the value model starts as: policy or reward model.")
    ] = "policy"
    value_lr: Annotated[
        float | None, Field(description="Peak learning rate of the value model; default: lr.", gt=0)
    ] = None
    gamma: Annotated[float, Field(description="Discount of later rewards.", gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(description="Lambda of the advantage estimate.", ge=0, le=1)] = 0.95
    clip: Annotated[float, Field(description="Clip range of the probability ratio.", gt=0)] = 0.2
    value_clip: Annotated[float, Field(description="Clip range of the value around its old one.", gt=0)] = 0.2
    value_coef: Annotated[float, Field(description="Weight of the value loss.", ge=0)] = 0.1
    ppo_epochs: Annotated[int, Field(description="Passes over each batch of samples.", ge=1)] = 4
    minibatches: Annotated[int, Field(description="Optimiser steps in each of those passes.", ge=1)] = 1
    max_update_kl: Annotated[
        float | None,
        Field(description="Leave a batch of samples once the policy is this far from them, nats a token.", gt=0),
    ] = None
    lr: Annotated[float, Field(description="Peak learning rate.", gt=0)] = 3e-6
    max_grad_norm: Annotated[float, Field(description="Gradient norm is clipped to this.", gt=0)] = 1.0

    @model_validator(mode="after")
    def _controller_and_batches(self) -> "PPOConfig":
        if self.lora_dropout:
            raise ValueError("lora_dropout cannot be had with ppo: what samples and what is trained would differ")
        if self.target_kl is None and self._changed("kl_horizon"):
            raise ValueError("kl_horizon does nothing without target_kl")
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError("kl_coef 0 stays 0 whatever target_kl is: the controller multiplies it")
        if not self.value_coef and self.value_from == "reward":
            raise ValueError("value_from does nothing with value_coef 0, which leaves the value model as it is")
        if self.minibatches > self.batch_prompts:
            raise ValueError("minibatches must be at most batch_prompts: samples of a prompt stay together")
        samples = self.batch_prompts * self.completions
        if self.target_kl is not None and samples >= 5 * self.kl_horizon:
            raise ValueError(f"kl_horizon must be above a fifth of a batch's {samples} samples, or kl_coef turns to 0")
        if self.max_length is not None and self.max_new_tokens >= self.max_length:
            raise ValueError("max_new_tokens must be below max_length, or no prompt fits")
        if self.max_length and (self.max_prompt_length or 0) > self.max_length - self.max_new_tokens:
            raise ValueError("max_prompt_length must leave max_new_tokens of max_length")
        return self

    @model_validator(mode="after")
    def _no_ppo_option_without_effect(self) -> "PPOConfig":
        if self.ppo_epochs == self.minibatches == 1:
            for name in ("clip", "value_clip", "max_update_kl"):
                if self._changed(name):
                    raise ValueError(
                        f"{name} does nothing with ppo_epochs 1 and minibatches 1: nothing moves before it"
                    )
        if self.value_coef == 0:
            for name in ("value_clip", "value_lr"):
                if self._changed(name):
                    raise ValueError(f"{name} does nothing with value_coef 0")
        return self


def _term_as_written(term: Any) -> Any:
    """`simpo` and `sft=0.2`, as on the command line, as the mapping that a file has."""
    if not isinstance(term, str):
        return term
    name, equals, weight = term.partition("=")
    return {"name": name, "weight": weight} if equals else {"name": name}
