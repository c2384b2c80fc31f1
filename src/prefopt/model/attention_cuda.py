"""Attention over packed rows on a GPU: the whole row in one kernel call a layer.

Two kernels, each with what it alone can do:

- `varlen`: flash attention over sequences of different lengths. Keys and values of a shared prompt
  are gathered again for every further completion; the backward pass adds their gradients up.
- `flex`: FlexAttention, compiled, with a block mask over the row as it stands: capped scores,
  attention sinks, float32.

What neither does goes segment by segment (`model.attention`), slow on a GPU but right.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from prefopt.data.pack import Segment, SegmentLayout

__all__ = ["BLOCK", "Kernel", "block_mask", "choose_kernel", "cuda_attention", "flex", "mask_function", "varlen"]

Kernel = Literal["varlen", "flex", "segments"]

BLOCK = 128  # FlexAttention's own block size; a row shorter than one would take its decoding kernel

# torch 2.11 has no `enable_gqa` here; key and value heads are then repeated.
_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention compiled for rows of any length: not again for every new one."""
    return torch.compile(flex_attention, dynamic=True)


def choose_kernel(
    *,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    capped: bool,
    sinks: bool,
    dropout: bool,
    capability: tuple[int, int],
    triton: bool,
) -> Kernel:
    """The fastest kernel that computes this layer exactly.

    Flash attention wants 16-bit numbers, an Ampere card or later and heads of a multiple of 8 up to
    256 wide (between 192 and 256 not on every card); torch's wrapper drops the gradient through the
    log-sum-exp, which sinks need, and has no cap. FlexAttention wants Triton and heads 16 wide or more.
    """
    if dropout:
        return "segments"
    wide = head_dim % 8 == 0 and (head_dim <= 192 or head_dim == 256)
    half = dtype in (torch.bfloat16, torch.float16)
    if half and wide and head_dim == value_dim and capability >= (8, 0) and not capped and not sinks:
        return "varlen"
    return "flex" if triton and min(head_dim, value_dim) >= 16 else "segments"


@cache
def _card(device: torch.device) -> dict[str, Any]:
    return {"capability": torch.cuda.get_device_capability(device), "triton": find_spec("triton") is not None}


def cuda_attention(
    query: Float[Tensor, "1 heads slots dim"],
    key: Float[Tensor, "1 kv_heads slots dim"],
    value: Float[Tensor, "1 kv_heads slots value_dim"],
    layout: SegmentLayout,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "1 slots heads value_dim"] | None:
    """Attention of every segment's queries to their own causal history, or None: go by segments.

    Args:
        window: A query sees keys at most `window - 1` positions back.
        softcap: Scores become softcap * tanh(scores / softcap).
        sinks: Logit of a key without a value that every query of a head sees.
    """
    kernel = choose_kernel(
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        capped=softcap is not None,
        sinks=sinks is not None,
        dropout=dropout > 0,
        **_card(query.device),
    )
    if window is not None and window >= layout.max_k:
        window = None
    if kernel == "varlen":
        return varlen(query, key, value, layout, scaling=scaling, window=window)
    if kernel == "flex":
        return flex(query, key, value, layout, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    return None


def varlen(
    query: Float[Tensor, "1 heads slots dim"],
    key: Float[Tensor, "1 kv_heads slots dim"],
    value: Float[Tensor, "1 kv_heads slots dim"],
    layout: SegmentLayout,
    *,
    scaling: float | None,
    window: int | None,
    kernel: Callable[..., Any] = varlen_attn,
    grouped_heads: bool = _GROUPED_HEADS,
) -> Float[Tensor, "1 slots heads dim"]:
    """One flash-attention call: segment i is queries [cu_seq_q[i], cu_seq_q[i+1]) against as many gathered keys.

    Causal from the bottom right: the last query of a segment sees all its keys. Flash attention's
    window counts the keys to the left of a query's own, so ours less one.
    """
    groups = query.shape[1] // key.shape[1]
    k, v = (states[0].transpose(0, 1) for states in (key, value))  # [slots, kv_heads, dim]
    if layout.key_slots is not None:
        k, v = k.index_select(0, layout.key_slots), v.index_select(0, layout.key_slots)
    if groups > 1 and not grouped_heads:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out: Tensor = kernel(
        query[0].transpose(0, 1),
        k,
        v,
        layout.cu_seq_q,
        layout.cu_seq_k,
        layout.max_q,
        layout.max_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": True} if groups > 1 and grouped_heads else {}),
    )
    return out[None]


def flex(
    query: Float[Tensor, "1 heads slots dim"],
    key: Float[Tensor, "1 kv_heads slots dim"],
    value: Float[Tensor, "1 kv_heads slots value_dim"],
    layout: SegmentLayout,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    kernel: Callable[..., Any] | None = None,
) -> Float[Tensor, "1 slots heads value_dim"]:
    """One FlexAttention call over the row, lengthened to whole blocks by slots that see themselves alone.

    A sink s takes its share of the softmax and gives nothing: with the log-sum-exp z of a query's
    scores the output is multiplied by e^z / (e^z + e^s) = sigmoid(z - s).
    """
    if ("mask", window) not in layout.made:
        layout.made["mask", window] = block_mask(layout, window, query.device)
    slots = query.shape[2]
    q, k, v = (F.pad(states, (0, 0, 0, -slots % BLOCK)) for states in (query, key, value))
    result = (kernel or compiled_flex())(
        q,
        k,
        v,
        score_mod=None if softcap is None else _cap(softcap, layout, query.device),
        block_mask=layout.made["mask", window],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    out: Tensor = result if sinks is None else _with_sinks(result[0], result[1].lse, sinks)
    return out[:, :, :slots].transpose(1, 2)


def _with_sinks(
    out: Float[Tensor, "1 heads slots value_dim"],
    logsumexp: Float[Tensor, "1 heads slots"],
    sinks: Float[Tensor, " heads"],
) -> Float[Tensor, "1 heads slots value_dim"]:
    share = torch.sigmoid(logsumexp - sinks.float()[:, None])
    return (out * share[..., None]).to(out.dtype)


def _cap(softcap: float, layout: SegmentLayout, device: torch.device) -> Callable[..., Tensor]:
    """The cap as a score function; the number is a tensor, for a captured float may be compiled in anew."""
    if ("cap", softcap) not in layout.made:
        cap = torch.full((), softcap, device=device)
        layout.made["cap", softcap] = lambda score, b, h, q, k: cap * torch.tanh(score / cap)
    return layout.made["cap", softcap]  # type: ignore[no-any-return]


def mask_function(layout: SegmentLayout, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's mask: query slot q sees key slot k of its own segment so far, or of its prefix.

    Both are runs of slots, so a window only moves their beginnings: with q - own_start own slots
    before it, a query sees own slots from q - window + 1 and misses as much less of the prefix's end.
    """
    own, prefix, stop = (
        F.pad(bound.long(), (0, -len(bound) % BLOCK))
        for bound in (layout.own_start, layout.prefix_start, layout.prefix_stop)
    )
    slot = torch.arange(len(own), device=device)
    own[len(layout.own_start) :] = slot[len(layout.own_start) :]
    if window is not None:
        prefix = torch.maximum(prefix, stop + slot - own - window + 1)
        own = torch.maximum(own, slot - window + 1)
    own, prefix, stop = own.int(), prefix.int(), stop.int()
    # A lambda: the shape checks that tests wrap around a function would be compiled with it.
    return lambda b, h, q, k: ((own[q] <= k) & (k <= q)) | ((prefix[q] <= k) & (k < stop[q]))


def block_mask(layout: SegmentLayout, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries needs, and of which it needs all, so that no mask is asked.

    Worked out block by block on the CPU: the mask of every slot with every slot is never made.
    """
    slots = -(-len(layout.own_start) // BLOCK) * BLOCK
    some = np.eye(slots // BLOCK, dtype=bool)
    whole = np.zeros_like(some)
    for segment in layout.segments:
        _mark(some, whole, segment, segment.start, segment.stop, segment.start, window)
        # Seen from its own slots the prefix stands right before them.
        _mark(some, whole, segment, segment.prefix_start, segment.prefix_stop, segment.start - segment.prefix, window)
    some &= ~whole
    return BlockMask.from_kv_blocks(
        _int32(some.sum(1), device),
        _int32(np.argsort(~some, axis=1, kind="stable"), device),
        _int32(whole.sum(1), device),
        _int32(np.argsort(~whole, axis=1, kind="stable"), device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(layout, window, device),
        seq_lengths=(slots, slots),
    )


def _int32(values: np.ndarray, device: torch.device) -> Int[Tensor, "1 1 ..."]:
    made = torch.from_numpy(values.astype(np.int32)[None, None])
    # From page-locked memory, or the host would wait for the copy.
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def _mark(
    some: Bool[np.ndarray, "blocks blocks"],
    whole: Bool[np.ndarray, "blocks blocks"],
    segment: Segment,
    first: int,
    stop: int,
    seen_from: int,
    window: int | None,
) -> None:
    """Add what a segment's queries see of the keys in slots [first, stop).

    Args:
        seen_from: Where slot `first` would stand if key and query slots were as far apart as their positions.
    """
    if first == stop or segment.start == segment.stop:
        return
    low_q, high_q = _edges(segment.start, segment.stop)
    low_k, high_k = _edges(first, stop)
    shift = seen_from - first
    nearest = low_q[:, None] - (high_k + shift)  # least and largest distance of a query from a key
    furthest = high_q[:, None] - (low_k + shift)
    reach = np.inf if window is None else window
    rows, columns = (slice(a // BLOCK, (b - 1) // BLOCK + 1) for a, b in ((segment.start, segment.stop), (first, stop)))
    some[rows, columns] |= (furthest >= 0) & (nearest < reach)
    full_q, full_k = high_q - low_q == BLOCK - 1, high_k - low_k == BLOCK - 1
    whole[rows, columns] |= full_q[:, None] & full_k & (nearest >= 0) & (furthest < reach)


def _edges(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last slot of [start, stop) in every block it touches."""
    blocks = np.arange(start // BLOCK, (stop - 1) // BLOCK + 1) * BLOCK
    return np.maximum(blocks, start), np.minimum(blocks + BLOCK, stop) - 1
