"""Attention of decoding, where a prompt's keys and values stand once for all its samples.

Two kinds of forward pass, each given to the model as the keyword argument `decoding`: `Prefill` runs
prompts padded on the right and keeps their keys and values; `Step` runs one token of every sample
against its prompt's keys, shared, and its own. The two parts of a softmax are computed apart and
joined by their largest score and their sum, which is exact (Milakov and Gimelshein 2018,
arXiv 1805.02867); the prompt's part takes the queries of all its samples in one product.

Like attention by segments it is plugged into transformers without a mask function.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface

from prefopt.model.attention import UnsharableError

__all__ = ["DECODE", "Prefill", "Shelf", "Step"]

DECODE = "prefopt_decode"
_FLOOR = -1e30  # instead of the -inf that is the top of no scores at all


class Shelf:
    """Keys and values of every layer, [places, kv_heads, tokens, dim]; a place is a prompt's or a sample's."""

    def __init__(self) -> None:
        self.places = 0
        self.tokens = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, places: int, tokens: int) -> None:
        """Room for so many places and tokens, which hold all that is in use; other room is given up if any is added.

        A shelf that kept the most it ever had of either would hold many short prompts at the length of a long one.
        """
        if places <= self.places and tokens <= self.tokens:
            return
        self.places, self.tokens = places, tokens
        for index in self._layers:  # one after the other, so that only one stands there twice
            key, value = self._layers[index]
            self._layers[index] = self._sized(key), self._sized(value)

    def _sized(self, old: Tensor) -> Tensor:
        # Zeros: what was never written is masked, but must be finite.
        new = old.new_zeros(self.places, old.shape[1], self.tokens, old.shape[3])
        places, tokens = min(self.places, old.shape[0]), min(self.tokens, old.shape[2])
        new[:places, :, :tokens] = old[:places, :, :tokens]
        return new

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, made in the shape of `key` and `value` when first asked for."""
        if index not in self._layers:
            self._layers[index] = self._sized(key[:0, :, :0]), self._sized(value[:0, :, :0])
        return self._layers[index]

    def move(self, sources: Int[Tensor, " moves"], targets: Int[Tensor, " moves"]) -> None:
        """Put what stands at `sources` at `targets`."""
        for pair in self._layers.values():
            for states in pair:
                states[targets] = states[sources]

    @property
    def elements(self) -> int:
        """Numbers held, over all layers."""
        return sum(states.numel() for pair in self._layers.values() for states in pair)


@dataclass(frozen=True)
class _Rule:
    """What a layer does to its scores."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Float[Tensor, "1 kv groups 1"] | None


@dataclass(frozen=True)
class Prefill:
    """Prompts, padded on the right, whose keys and values go to `places` of the shelf."""

    prompts: Shelf
    places: Int[Tensor, " prompts"]

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "prompts heads tokens dim"],
        key: Float[Tensor, "prompts kv tokens dim"],
        value: Float[Tensor, "prompts kv tokens value_dim"],
        rule: _Rule,
    ) -> Float[Tensor, "prompts heads tokens value_dim"]:
        """Plain causal attention: no token of a prompt sees the padding behind it."""
        tokens = query.shape[2]
        keys, values = self.prompts.layer(layer, key, value)
        keys[self.places, :, :tokens] = key
        values[self.places, :, :tokens] = value
        window = rule.window if rule.window and rule.window < tokens else None
        groups = query.shape[1] // key.shape[1]
        visible = None
        if window or rule.softcap or rule.sinks is not None:
            at = torch.arange(tokens, device=query.device)
            visible = (at <= at[:, None]) & (at > at[:, None] - (window or tokens))
        if rule.softcap is None and rule.sinks is None:
            return F.scaled_dot_product_attention(
                query, key, value, visible, is_causal=visible is None, scale=rule.scale, enable_gqa=groups > 1
            )
        assert visible is not None
        bias = _bias(visible).repeat(groups, 1)
        sinks = None if rule.sinks is None else rule.sinks.repeat_interleave(tokens, dim=2)
        flat = (1, key.shape[1], groups * tokens)
        out = []
        for q, k, v in zip(query, key, value, strict=True):  # one by one: all scores at once would be large
            part = _part(q.reshape(*flat, -1), k[None], v[None], bias, rule)
            out.append(_joined([part], sinks).to(v.dtype))
        return torch.cat(out).reshape(len(query), query.shape[1], tokens, -1)


@dataclass(frozen=True)
class Step:
    """One token of every sample.

    Attributes:
        places: The prompt's place for each row, a row being a sample's place on the shelf `own`.
        lanes: Which of its prompt's rows a row is.
        ages: Tokens a row has on the shelf, this one counted.
        prompt_lengths: Tokens of the prompt at each place in use.
        longest: (longest prompt, highest age), and `width`, the most rows of one prompt: known to the host.
    """

    prompts: Shelf
    own: Shelf
    places: Int[Tensor, " rows"]
    lanes: Int[Tensor, " rows"]
    ages: Int[Tensor, " rows"]
    prompt_lengths: Int[Tensor, " places"]
    longest: tuple[int, int]
    width: int
    _biases: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "rows heads 1 dim"],
        key: Float[Tensor, "rows kv 1 dim"],
        value: Float[Tensor, "rows kv 1 value_dim"],
        rule: _Rule,
    ) -> Float[Tensor, "rows heads 1 value_dim"]:
        """Keep each row's key and value, and attend to its prompt and its own tokens."""
        rows, heads, _, dim = query.shape
        kv = key.shape[1]
        groups, places = heads // kv, len(self.prompt_lengths)
        prompt_tokens, own_tokens = self.longest
        keys, values = self.own.layer(layer, key, value)
        row = torch.arange(rows, device=query.device)
        keys[row, :, self.ages - 1] = key[:, :, 0]
        values[row, :, self.ages - 1] = value[:, :, 0]
        shared_bias, own_bias = self._bias_of(rule.window, groups)

        q = query.reshape(rows, kv, groups, dim)
        own = _part(q, keys[:rows, :, :own_tokens], values[:rows, :, :own_tokens], own_bias, rule)

        # Rows of one prompt side by side: [places, width] -> [places, kv, width * groups].
        slots = self.places * self.width + self.lanes
        grouped = q.new_zeros(places * self.width, kv, groups, dim).index_copy_(0, slots, q)
        grouped = grouped.view(places, self.width, kv, groups, dim).transpose(1, 2).reshape(places, kv, -1, dim)
        keys, values = self.prompts.layer(layer, key, value)
        part = _part(grouped, keys[:places, :, :prompt_tokens], values[:places, :, :prompt_tokens], shared_bias, rule)
        spread = torch.cat([part.out, part.top, part.total], dim=-1).view(places, kv, self.width, groups, -1)
        spread = spread.transpose(1, 2).reshape(places * self.width, kv, groups, -1)[slots]
        shared = _Part(spread[..., :-2], spread[..., -2:-1], spread[..., -1:])

        return _joined([shared, own], rule.sinks).to(value.dtype).reshape(rows, heads, 1, -1)

    def _bias_of(
        self, window: int | None, groups: int
    ) -> tuple[Float[Tensor, "_ 1 _ prompt_tokens"], Float[Tensor, "rows 1 1 own_tokens"]]:
        """0 for what a query sees and -inf for the rest, of prompts and of own tokens; once per kind of layer.

        Windows are over positions: a row at position p sees keys at positions above p - window.
        """
        if (window, groups) not in self._biases:
            prompt_tokens, own_tokens = self.longest
            at = torch.arange(max(self.longest), device=self.ages.device)
            shared = at[:prompt_tokens] < self.prompt_lengths[:, None]  # [places, prompt_tokens]
            shared = shared[:, None, None]
            own = at[:own_tokens] < self.ages[:, None]  # [rows, own_tokens]
            if window:
                first = self.prompt_lengths[self.places] + self.ages - window  # lowest position a row sees
                own = own & (at[:own_tokens] >= (self.ages - window)[:, None])
                grouped = first.new_zeros(len(shared) * self.width)
                grouped[self.places * self.width + self.lanes] = first
                lowest = grouped.view(len(shared), 1, self.width, 1).repeat_interleave(groups, dim=2)
                shared = shared & (at[:prompt_tokens] >= lowest)
            self._biases[window, groups] = _bias(shared), _bias(own[:, None, None])
        return self._biases[window, groups]


@dataclass(frozen=True)
class _Part:
    """Softmax over some of the keys: sum of exp(score - top) * value, the top, and sum of exp(score - top)."""

    out: Float[Tensor, "b kv queries value_dim"]
    top: Float[Tensor, "b kv queries 1"]
    total: Float[Tensor, "b kv queries 1"]


def _bias(visible: Tensor) -> Tensor:
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, float("-inf"))


def _part(
    q: Float[Tensor, "b kv queries dim"],
    k: Float[Tensor, "b kv keys dim"],
    v: Float[Tensor, "b kv keys value_dim"],
    bias: Tensor,
    rule: _Rule,
) -> _Part:
    scores = (q @ k.transpose(2, 3)).float().mul_(rule.scale)
    if rule.softcap is not None:
        scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    scores += bias
    top = scores.amax(dim=3, keepdim=True).clamp_(min=_FLOOR)
    weights = scores.sub_(top).exp_()
    return _Part((weights.to(v.dtype) @ v).float(), top, weights.sum(dim=3, keepdim=True))


def _joined(parts: list[_Part], sinks: Tensor | None) -> Float[Tensor, "b kv queries value_dim"]:
    """The whole softmax from its parts; sinks are scores without a value (GPT-OSS)."""
    top = torch.stack([p.top for p in parts]).amax(dim=0)
    if sinks is not None:
        top = torch.maximum(top, sinks.float())
    shares = [torch.exp(p.top - top) for p in parts]
    total = torch.stack([p.total * share for p, share in zip(parts, shares, strict=True)]).sum(dim=0)
    if sinks is not None:
        total = total + torch.exp(sinks.float() - top)
    return torch.stack([p.out * (share / total) for p, share in zip(parts, shares, strict=True)]).sum(dim=0)


def decode_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads tokens dim"],
    key: Float[Tensor, "rows kv_heads tokens dim"],
    value: Float[Tensor, "rows kv_heads tokens value_dim"],
    attention_mask: Tensor | None,
    *,
    decoding: Prefill | Step | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "rows tokens heads value_dim"], None]:
    """What transformers calls in every attention layer.

    Raises:
        UnsharableError: a mask built by the model itself, a layer without a number or one that keeps
            keyword arguments to itself.
    """
    if decoding is None:
        raise UnsharableError("what their layers do not pass on to their attention")
    if attention_mask is not None:
        raise UnsharableError("a mask of the model's own")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsharableError("a cache of their own: they are not numbered")
    sinks = None if s_aux is None else s_aux.view(1, key.shape[1], -1, 1)
    rule = _Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, sinks)
    return decoding.attend(layer, query, key, value, rule).transpose(1, 2), None


AttentionInterface.register(DECODE, decode_attention)
