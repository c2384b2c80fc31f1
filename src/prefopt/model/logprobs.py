"""Sequence log-probabilities of a packed batch: the one function that every recipe scores with.

Two paths with the same values and gradients: `shared` runs the row as it stands (prompt once, no
padding) with attention by segments; `padded` unpacks it into one row per sequence for models that
cannot share a prefix. `choose_path` decides by inspection and proves it on the first batch,
against transformers' own logits, one sequence at a time.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.data.pack import PackedBatch
from prefopt.errors import ModelError
from prefopt.model.attention import SEGMENTS, UnsharableError, cannot_share
from prefopt.model.head import head_of, target_logprobs

__all__ = [
    "Path",
    "PathChoice",
    "choose_path",
    "plain_attention",
    "plain_model",
    "sequence_logprob_sum",
    "target_hidden",
    "transformers_logprob_sum",
]

Path = Literal["shared", "padded"]

# Largest difference of a sequence log-probability between the two paths, per scored token (nats).
# float32: rounding, orders below what any layout mistake makes; bfloat16: 8 bits of mantissa.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def plain_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself: under peft, the base with its adapter layers in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def sequence_logprob_sum(model: torch.nn.Module, batch: PackedBatch, path: Path) -> Float[Tensor, " sequences"]:
    """Sum over each completion's scored tokens of log p(token | prompt, earlier tokens), float32, in nats."""
    hidden = target_hidden(model, batch, path)
    logprobs = target_logprobs(head_of(plain_model(model)), hidden, batch.targets)
    return torch.zeros(batch.sequences, device=logprobs.device).index_add(0, batch.sequence_of_target, logprobs)


def target_hidden(model: torch.nn.Module, batch: PackedBatch, path: Path) -> Float[Tensor, "targets hidden"]:
    """The last hidden states that predict `batch.targets`, in the same order."""
    return _shared_hidden(model, batch) if path == "shared" else _padded_hidden(model, batch)


def _shared_hidden(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, "targets hidden"]:
    out = _backbone(model, SEGMENTS)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        layout=batch.layout,
    )
    hidden: Tensor = out.last_hidden_state[0, batch.predictors]
    return hidden


def _padded_hidden(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, "targets hidden"]:
    """Prompt and completion of each sequence in a row of its own, padded on the right."""
    sequences = _sequence_ids(batch)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    out = _backbone(model, plain_attention(plain_model(model)))(input_ids=ids, attention_mask=mask, use_cache=False)
    # In a padded row slot and position agree, so a target's predictor stands at its position.
    hidden: Tensor = out.last_hidden_state[batch.sequence_of_target, batch.position_ids[batch.predictors]]
    return hidden


def _backbone(model: torch.nn.Module, attention: str) -> torch.nn.Module:
    """Everything below the head, with the attention implementation set."""
    plain = plain_model(model)
    _set_attention(plain, attention)
    backbone: torch.nn.Module = plain.base_model
    return backbone


def _set_attention(plain: PreTrainedModel, attention: str) -> None:
    if plain.config._attn_implementation != attention:
        plain.set_attn_implementation(attention)


def plain_attention(model: PreTrainedModel) -> str:
    """transformers' exact implementation for this model; its sdpa drops Gemma 2's soft cap silently."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def _sequence_ids(batch: PackedBatch) -> list[Int[Tensor, " _"]]:
    return [
        torch.cat([batch.input_ids[prompt.start : prompt.stop], batch.input_ids[own.start : own.stop]])
        for prompt, own in batch.spans
    ]


def transformers_logprob_sum(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, " sequences"]:
    """The plain twin: transformers' own logits, one sequence at a time, no packing, no padding, no tiles."""
    plain = plain_model(model)
    _set_attention(plain, plain_attention(plain))
    sums = []
    for number, ids in enumerate(_sequence_ids(batch)):
        mine = batch.sequence_of_target == number
        logits = plain(input_ids=ids[None], use_cache=False).logits[0].float()
        position = batch.position_ids[batch.predictors[mine]]
        sums.append(torch.log_softmax(logits[position], dim=-1).gather(1, batch.targets[mine, None]).sum())
    return torch.stack(sums)


@dataclass(frozen=True)
class PathChoice:
    """Which path a run takes, why, and the largest difference to transformers' own log-probabilities.

    Attributes:
        max_difference: Of a sequence log-probability on the first batch, nats.
    """

    path: Path
    reason: str
    max_difference: float

    def __str__(self) -> str:
        shared = "prompts shared, no padding" if self.path == "shared" else "one padded row per completion"
        return (
            f"log-probabilities: {self.path} path ({shared}) - {self.reason}; "
            f"largest difference to transformers on the first batch {self.max_difference:.1e} nats a sequence"
        )


def choose_path(model: torch.nn.Module, batch: PackedBatch) -> PathChoice:
    """Inspect the model, score `batch` shared and plainly, and take the shared path only if both agree.

    Raises:
        ModelError: neither path gives transformers' log-probabilities, so the model does something
            to its logits that `model.head` does not know.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _compare(model, batch)
    finally:
        model.train(was_training)


def _compare(model: torch.nn.Module, batch: PackedBatch) -> PathChoice:
    truth = transformers_logprob_sum(model, batch)
    limit = _TOLERANCE[next(plain_model(model).parameters()).dtype] * batch.token_counts.clamp(min=1)

    def off(path: Path) -> tuple[bool, float]:
        difference = (sequence_logprob_sum(model, batch, path) - truth).abs()
        return bool((difference <= limit).all()), float(difference.max())  # a NaN is not <= anything

    reason = cannot_share(plain_model(model))
    if reason is None:
        try:
            agrees, difference = off("shared")
            if agrees:
                return PathChoice("shared", "checked against transformers", difference)
            reason = f"shared differs from transformers by {difference:.1e} nats"
        except UnsharableError as error:
            reason = f"its layers need {error}"
    agrees, difference = off("padded")
    if not agrees:
        raise ModelError(
            "The model's log-probabilities cannot be reproduced.",
            got=f"a difference of {difference:.2e} nats a sequence to transformers' own logits",
            expected=f"at most {float(limit.max()):.1e}",
            todo="Its head or its padding does something unknown; please report the model type.",
        )
    return PathChoice("padded", reason, difference)
