"""Attention over packed rows, plugged into transformers through its `AttentionInterface`.

Each segment is "these queries against exactly their causal history" (see `data.pack`). On a CPU
that is one SDPA call per segment; the keys and values of a shared prompt are gathered again for
every further completion, a copy that is negligible next to running the prompt again.

No mask function is registered with it, so transformers builds no mask; the segments arrive as a
keyword argument of the model's forward call.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from prefopt.data.pack import Segment, SegmentLayout
from prefopt.model.attention_cuda import cuda_attention

__all__ = ["SEGMENTS", "UnsharableError", "cannot_pack", "cannot_share", "segment_attention"]

SEGMENTS = "prefopt_segments"


class UnsharableError(Exception):
    """A layer needs something that attention by segments does not do; another path serves."""


def cannot_share(model: PreTrainedModel) -> str | None:
    """Why `model` cannot take packed rows with shared prompts, or None if by inspection it can.

    Inspection is not proof: the first batch of a run is scored both ways (`model.paths`).
    """
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} has no pluggable attention"
    return _bound_to_slots(model)


def cannot_pack(model: PreTrainedModel) -> str | None:
    """Why `model` cannot take rows of several sequences in transformers' own way, or None if it may."""
    if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
        return "it counts positions by slot"
    return _bound_to_slots(model)


def _bound_to_slots(model: PreTrainedModel) -> str | None:
    """What ties a layer's result to where in the row a sequence stands."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of kind {', '.join(sorted(other))}"
    if getattr(config, "alibi", False):
        return "its position bias counts slots"
    if getattr(config, "attn_temperature_tuning", False):
        return "it scales queries by slot"
    return None


def segment_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads slots dim"],
    key: Float[Tensor, "1 kv_heads slots dim"],
    value: Float[Tensor, "1 kv_heads slots value_dim"],
    attention_mask: Tensor | None,
    *,
    layout: SegmentLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 slots heads value_dim"], None]:
    """Attention of every segment's queries to their own causal history.

    Args:
        layout: Who attends to whom, from `PackedBatch.layout`.
        sliding_window: A query sees keys at most `sliding_window - 1` positions back.
        softcap: Scores become softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: Attention sinks, a logit per head (GPT-OSS).

    Raises:
        UnsharableError: a mask built by the model itself, or a layer that keeps keyword arguments to itself.
    """
    if layout is None:
        raise UnsharableError("its layers do not pass the layout of the row on to their attention")
    if query.is_cuda and attention_mask is None:
        out = cuda_attention(
            query,
            key,
            value,
            layout,
            scaling=scaling,
            dropout=dropout,
            window=sliding_window or None,
            softcap=softcap,
            sinks=s_aux,
        )
        if out is not None:
            return out, None
    if attention_mask is not None:
        raise UnsharableError("it builds a mask of its own")
    sizes = [segment.stop - segment.start for segment in layout.segments]
    # Split once: slicing segment by segment would give each its own gradient of the whole row.
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    number = {segment.start: i for i, segment in enumerate(layout.segments)}
    parts = []
    for segment, q, k, v in zip(layout.segments, queries, keys, values, strict=True):
        if segment.prefix:
            first = number[segment.prefix_start]
            k, v = (torch.cat([of[first][:, :, : segment.prefix], own], 2) for of, own in ((keys, k), (values, v)))
        window = sliding_window if sliding_window and sliding_window < k.shape[2] else None
        if softcap is not None or s_aux is not None:
            visible = _visible(layout, segment, window, q)
            parts.append(_written_out(q, k, v, visible, scaling, softcap, s_aux, dropout))
            continue
        plain = not segment.prefix and window is None
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if plain else _visible(layout, segment, window, q),
            is_causal=plain,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(attended)
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _visible(
    layout: SegmentLayout, segment: Segment, window: int | None, like: Tensor
) -> Float[Tensor, "queries keys"]:
    """0 where a query sees a key, else -inf; made once for all layers.

    Both count positions, which are contiguous within a segment.
    """
    shape = ("visible", segment.prefix, segment.stop - segment.start, window, like.dtype)
    if shape not in layout.made:
        keys = torch.arange(segment.prefix + segment.stop - segment.start, device=like.device)
        queries = keys[segment.prefix :, None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        layout.made[shape] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
            hidden, float("-inf")
        )
    visible: Tensor = layout.made[shape]
    return visible


def _written_out(
    q: Float[Tensor, "1 h queries d"],
    k: Float[Tensor, "1 kv keys d"],
    v: Float[Tensor, "1 kv keys dv"],
    visible: Float[Tensor, "queries keys"],
    scaling: float | None,
    softcap: float | None,
    sinks: Float[Tensor, " h"] | None,
    dropout: float,
) -> Float[Tensor, "1 h queries dv"]:
    """Attention with its scores in memory: capped, or with a sink, a key every query sees that has no value."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + visible
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout, training=dropout > 0) @ v


AttentionInterface.register(SEGMENTS, torch.compiler.disable(segment_attention))
