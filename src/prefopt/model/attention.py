"""Attention over packed rows, plugged into transformers through its `AttentionInterface`.

Each segment is "these queries against exactly their causal history" (see `data.pack`). On a CPU
that is one SDPA call per segment; the keys and values of a shared prompt are gathered again for
every further completion, a copy that is negligible next to running the prompt again.

No mask function is registered with it, so transformers builds no mask; the segments arrive as a
keyword argument of the model's forward call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from prefopt.data.pack import Segment, SegmentLayout
from prefopt.model.attention_cuda import cuda_attention

__all__ = ["SEGMENTS", "UnsharableError", "cannot_share", "segment_attention"]

SEGMENTS = "prefopt_segments"


class UnsharableError(Exception):
    """A layer needs something that attention by segments does not do; the padded path serves."""


def cannot_share(model: PreTrainedModel) -> str | None:
    """Why `model` cannot take packed rows with shared prompts, or None if by inspection it can.

    Inspection is not proof: the first batch of a run is scored both ways (`model.logprobs`).
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} has no pluggable attention"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"{type(model).__name__} has layers of kind {', '.join(sorted(other))}"
    return None


def segment_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads slots dim"],
    key: Float[Tensor, "1 kv_heads slots dim"],
    value: Float[Tensor, "1 kv_heads slots value_dim"],
    attention_mask: Tensor | None,
    *,
    layout: SegmentLayout,
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

    Raises:
        UnsharableError: attention sinks, or a mask built by the model itself.
    """
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
    if s_aux is not None:
        raise UnsharableError("attention sinks")
    if attention_mask is not None:
        raise UnsharableError("a mask of the model's own")
    groups = query.shape[1] // key.shape[1]
    parts = []
    for segment in layout.segments:
        q = query[:, :, segment.start : segment.stop]
        k = _history(key, segment)
        v = _history(value, segment)
        window = sliding_window if sliding_window and sliding_window < k.shape[2] else None
        if softcap is not None:
            scores = _softcapped(q, k, v, _visible(segment, window, q.device), scaling, softcap, groups, dropout)
        else:
            plain = not segment.prefix and window is None
            scores = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if plain else _visible(segment, window, q.device),
                is_causal=plain,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=groups > 1,
            )
        parts.append(scores)
    out = torch.cat(parts, dim=2).transpose(1, 2)
    return out, None


def _history(states: Float[Tensor, "1 h slots d"], segment: Segment) -> Float[Tensor, "1 h keys d"]:
    own = states[:, :, segment.start : segment.stop]
    if not segment.prefix:
        return own
    return torch.cat([states[:, :, segment.prefix_start : segment.prefix_stop], own], dim=2)


def _visible(segment: Segment, window: int | None, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Which keys each query sees; both count positions, which are contiguous within a segment."""
    keys = torch.arange(segment.prefix + segment.stop - segment.start, device=device)
    queries = keys[segment.prefix :, None]
    visible = keys <= queries
    return visible & (keys > queries - window) if window is not None else visible


def _softcapped(
    q: Float[Tensor, "1 h queries d"],
    k: Float[Tensor, "1 kv keys d"],
    v: Float[Tensor, "1 kv keys dv"],
    visible: Bool[Tensor, "queries keys"],
    scaling: float | None,
    softcap: float,
    groups: int,
    dropout: float,
) -> Float[Tensor, "1 h queries dv"]:
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~visible, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), dropout, training=dropout > 0)
    return weights @ v


# A compiled block stops before it and goes on after it: segments differ from row to row, kernels are compiled.
AttentionInterface.register(SEGMENTS, torch.compiler.disable(segment_attention))
