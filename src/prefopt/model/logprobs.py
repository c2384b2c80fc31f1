"""Sequence log-probabilities of a packed batch: the one function that every recipe scores with.

Three paths with the same values and gradients. `shared` runs the row as it stands (prompt once, no
padding) with attention by segments. `packed` writes every sequence out whole, several to a row, and
leaves it to transformers to keep them apart, which it does where positions start again. `padded`
gives each sequence a row of its own. `model.paths` chooses and proves the choice.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from prefopt.data.bins import best_fit_bins
from prefopt.data.pack import PackedBatch
from prefopt.model.attention import SEGMENTS
from prefopt.model.head import head_of, target_logprobs

__all__ = [
    "Path",
    "plain_attention",
    "plain_model",
    "sequence_logprob_sum",
    "sequence_ids",
    "set_attention",
    "target_hidden",
]

Path = Literal["shared", "packed", "padded"]

_ROW_TOKENS = 1024  # of a packed row: attention there has a mask of every slot with every slot


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
    if path == "shared":
        return _shared_hidden(model, batch)
    return _packed_hidden(model, batch) if path == "packed" else _padded_hidden(model, batch)


def _shared_hidden(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, "targets hidden"]:
    out = _backbone(model, SEGMENTS)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        layout=batch.layout,
    )
    hidden: Tensor = out.last_hidden_state[0, batch.predictors]
    return hidden


def _packed_hidden(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, "targets hidden"]:
    """Sequences one behind the other in rows of at most 1,024 tokens (or one sequence, if longer)."""
    plain = plain_model(model)
    sequences = sequence_ids(batch)
    lengths = [len(ids) for ids in sequences]
    limit = getattr(plain.config.get_text_config(), "max_position_embeddings", _ROW_TOKENS)
    rows = best_fit_bins(lengths, max(min(_ROW_TOKENS, limit), *lengths))
    device = batch.input_ids.device
    places = [torch.arange(length, device=device) for length in lengths]
    # Padding behind a row stands at position 0 again and again: a sequence of its own, seen by nobody.
    ids, positions = (
        pad_sequence([torch.cat([parts[i] for i in row]) for row in rows], batch_first=True)
        for parts in (sequences, places)
    )
    row_of, start_of = torch.empty((2, len(lengths)), dtype=torch.long)
    for number, row in enumerate(rows):
        row_of[row] = number
        start_of[row] = torch.tensor([0, *(lengths[i] for i in row[:-1])]).cumsum(0)
    out = _backbone(model, plain_attention(plain))(input_ids=ids, position_ids=positions, use_cache=False)
    sequence = batch.sequence_of_target
    slot = start_of.to(device)[sequence] + batch.position_ids[batch.predictors]
    hidden: Tensor = out.last_hidden_state[row_of.to(device)[sequence], slot]
    return hidden


def _padded_hidden(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, "targets hidden"]:
    """Prompt and completion of each sequence in a row of its own, padded on the right.

    Rows of like length go together, so that padding takes no more slots than there are tokens.
    """
    sequences = sequence_ids(batch)
    lengths = [len(s) for s in sequences]
    backbone, device = _backbone(model, plain_attention(plain_model(model))), batch.input_ids.device
    states, start_of, slots = list[Tensor](), [0] * len(sequences), 0
    for part in _alike(lengths):
        ids = pad_sequence([sequences[i] for i in part], batch_first=True)
        own = torch.tensor([lengths[i] for i in part], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < own[:, None]).long()
        out = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, i in enumerate(part):
            start_of[i] = slots + row * ids.shape[1]
        slots += ids.numel()
        states.append(out.flatten(0, 1))
    # In a padded row slot and position agree, so a target's predictor stands at its position.
    at = torch.tensor(start_of, device=device)[batch.sequence_of_target] + batch.position_ids[batch.predictors]
    return torch.cat(states)[at]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of `lengths`, longest first, in parts whose shortest is at least half their longest."""
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or 2 * lengths[i] < lengths[parts[-1][0]]:
            parts.append([])
        parts[-1].append(i)
    return parts


def _backbone(model: torch.nn.Module, attention: str) -> torch.nn.Module:
    """Everything below the head, with the attention implementation set."""
    plain = plain_model(model)
    set_attention(plain, attention)
    backbone: torch.nn.Module = plain.base_model
    # Llama 4's causal LM names as its base a part that only its multimodal sibling has.
    return backbone if backbone is not plain else plain.get_submodule("model")


def set_attention(plain: PreTrainedModel, attention: str) -> None:
    """Switch to an attention implementation, unless it is the one in place."""
    if plain.config._attn_implementation != attention:
        plain.set_attn_implementation(attention)


def plain_attention(model: PreTrainedModel) -> str:
    """transformers' exact implementation for this model; its sdpa drops Gemma 2's soft cap silently."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def sequence_ids(batch: PackedBatch) -> list[Int[Tensor, " _"]]:
    """Every sequence of the batch written out: prompt, then completion."""
    return [
        torch.cat([batch.input_ids[prompt.start : prompt.stop], batch.input_ids[own.start : own.stop]])
        for prompt, own in batch.spans
    ]
