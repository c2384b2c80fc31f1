"""The output head: log-probabilities of given targets without ever holding [tokens, vocab] logits.

Targets are processed in tiles of tokens, each over the WHOLE vocabulary. The forward pass turns a
tile's logits in place into their gradient, but for a coefficient a row that only the loss knows,
and takes the gradient of the hidden states from it. What the weight's gradient still needs is kept
where memory is set aside for it (three matrix products in all), else recomputed (four). A frozen
weight needs neither (two). Scoring takes one.

Precision: logits of bfloat16 operands are summed in float32; on a CPU the product's result is
rounded to bfloat16 (torch offers no other there), on CUDA it stays float32. Everything from there
to the log-probability is float32. The gradient's tile is rounded to the weight's dtype for its
products, and so are the rows of (coefficient x hidden); the weight's gradient is summed in float32
over the tiles, where on a CPU a tile's own product comes rounded. float64 models stay in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from prefopt.errors import ModelError
from prefopt.model.tiles import block_rows, borrow, give_back, kept_rows, slices, tile_rows

__all__ = ["Head", "HeadAdapter", "head_of", "logit_blocks", "target_logprobs"]


_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadAdapter:
    """LoRA on the head: adds scale * (dropout(hidden) @ a.T) @ b.T to hidden @ weight.T."""

    a: Float[Tensor, "rank hidden"]
    b: Float[Tensor, "vocab rank"]
    scale: float
    dropout: torch.nn.Module


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), the parts that exist."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    scale: float
    softcap: float | None
    adapter: HeadAdapter | None = None

    def tempered(self, temperature: float) -> "Head":
        """The head whose logits are this one's divided by `temperature`, cap included."""
        cap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=cap)

    def copied(self) -> "Head":
        """As it is now, whatever becomes of the model: detached copies, dropout off."""
        weight, bias = self.weight.detach().clone(), None if self.bias is None else self.bias.detach().clone()
        adapter = self.adapter
        if adapter is not None:
            a, b = adapter.a.detach().clone(), adapter.b.detach().clone()
            adapter = HeadAdapter(a, b, adapter.scale, torch.nn.Identity())
        return Head(weight, bias, self.scale, self.softcap, adapter)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a transformers causal LM, with what its forward pass does to the logits.

    `logit_scale` multiplies (Cohere), so does `lm_head_multiplier` (Falcon-H1); `logits_scaling`
    divides (Granite), except where it multiplies (HyperCLOVA X); `final_logit_softcapping` caps
    (Gemma 2), elsewhere called `logits_soft_cap` (RecurrentGemma) or `output_logit_soft_cap` (xLSTM).
    That this is all is verified on a run's first batch. A LoRA adapter on the head comes along,
    unless it is switched off.

    Raises:
        ModelError: the output embedding is not a plain linear layer, with or without a LoRA adapter.
    """
    layer = model.get_output_embeddings()
    adapter = None
    if isinstance(layer, LoraLayer):
        layer, adapter = layer.get_base_layer(), _adapter_of(layer)
    # FSDP makes a subclass of every module it shards; what counts is that the forward pass is linear's own.
    if not isinstance(layer, torch.nn.Linear) or type(layer).forward is not torch.nn.Linear.forward:
        raise ModelError(
            "The model's output head is not a plain linear layer.",
            got=type(layer).__name__,
            expected="torch.nn.Linear, with or without a LoRA adapter",
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale *= float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((float(cap) for name in caps if (cap := getattr(config, name, None))), None)
    return Head(layer.weight, layer.bias, scale, softcap, adapter)


def _adapter_of(layer: LoraLayer) -> HeadAdapter | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return None
    if len(names) > 1 or layer.lora_variant or layer.lora_bias[names[0]]:
        raise ModelError(
            "The adapter on the output head is of an unknown kind.",
            got=", ".join([*names, *layer.lora_variant]),
            expected="one plain LoRA adapter, without a bias",
        )
    (name,) = names
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return HeadAdapter(a, b, float(layer.scaling[name]), layer.lora_dropout[name])


@torch.compiler.disable(reason="in-place tiles and an autograd function of its own: nothing in it is left to fuse")  # type: ignore[untyped-decorator]
def target_logprobs(
    head: Head, hidden: Float[Tensor, "targets hidden"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """log softmax(logits)[target] for each target, in nats, float32 (float64 for a float64 model).

    Differentiable, once, in hidden, weight, bias and adapter. A sharded weight (DTensor) is gathered
    for the call, the logits never are; its gradient is the SUM over the ranks, put back into shards.
    """
    layer = _Layer.of(head, hidden)
    if layer.differentiable:
        result: Tensor = _TargetLogprobs.apply(targets, *layer.parts)  # type: ignore[no-untyped-call]
        return result
    logprobs = torch.empty(len(targets), dtype=layer.wide, device=hidden.device)
    for rows, logits in layer.all_blocks():
        logprobs[rows] = _logprobs(logits, targets[rows])[0]
    return logprobs


def logit_blocks(
    head: Head, hidden: Float[Tensor, "tokens hidden"]
) -> Iterator[tuple[slice, Float[Tensor, "_ vocab"]]]:
    """Final logits, float32, some tokens at a time: (which tokens, their logits, free to be overwritten).

    Two heads with one vocabulary come in the same pieces. No gradient flows.
    """
    with torch.no_grad():
        yield from _Layer.of(head, hidden).all_blocks()


@dataclass(frozen=True)
class _Layer:
    """A head at work on given hidden states; its adapter's narrow side is already computed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    reduced: Tensor | None  # [tokens, rank]
    b: Tensor | None  # [vocab, rank]
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, head: Head, hidden: Tensor) -> "_Layer":
        adapter, reduced, b = head.adapter, None, None
        if adapter is not None:
            narrow = torch.nn.functional.linear(adapter.dropout(hidden.to(adapter.a.dtype)), _whole(adapter.a))
            reduced, b = narrow * adapter.scale, _whole(adapter.b)
        bias = None if head.bias is None else _whole(head.bias)
        return cls(hidden, _whole(head.weight), bias, reduced, b, head.scale, head.softcap)

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.hidden, self.weight, self.bias, self.reduced, self.b, self.scale, self.softcap)

    @property
    def differentiable(self) -> bool:
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in self.parts)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and log-probabilities."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def tiles(self, start: int = 0) -> Iterator[slice]:
        return slices(start, len(self.hidden), tile_rows(len(self.weight), self.hidden.device))

    def scratch(self, start: int = 0) -> Tensor:
        """Room for any one of `tiles(start)`."""
        tile = next(self.tiles(start), slice(0, 0))
        return self.weight.new_empty(tile.stop - tile.start, len(self.weight))

    def all_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        scratch = self.scratch()
        for tile in self.tiles():
            for rows, logits in self.blocks(tile, scratch[: tile.stop - tile.start]):
                yield slice(tile.start + rows.start, tile.start + rows.stop), logits

    def blocks(self, tile: slice, out: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Final logits of a tile, a few rows at a time, float32; `out` is room for the product, and written.

        In float32 (and in float64) the logits are `out` itself.
        """
        product = _product(self.hidden[tile], self.weight.T, out)
        for rows in slices(0, len(product), block_rows(len(self.weight), product.device)):
            logits = product[rows].to(self.wide)
            if self.bias is not None:
                logits += self.bias
            if self.reduced is not None and self.b is not None:
                logits.addmm_(self.reduced[tile][rows].to(self.wide), self.b.T.to(self.wide))
            if self.scale != 1.0:
                logits *= self.scale
            if self.softcap is not None:
                logits.div_(self.softcap).tanh_().mul_(self.softcap)
            yield rows, logits

    def gradient(self, tile: slice, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Fill `out` with (softmax - onehot) * total * slope of the cap; give log-probabilities and totals.

        Times -coefficient * scale / total, row by row, that is the gradient with respect to
        hidden @ weight.T: the factor goes into the narrow side of each product instead.
        """
        logprobs = torch.empty(len(out), dtype=self.wide, device=out.device)
        totals = torch.empty_like(logprobs)
        for rows, logits in self.blocks(tile, out):
            slope = None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1)
            at = targets[tile][rows]
            logprobs[rows], totals[rows], delta = _logprobs(logits, at)
            delta.scatter_add_(1, at[:, None], -totals[rows, None])
            if slope is not None:
                delta *= slope
            if delta.data_ptr() != out[rows].data_ptr():
                out[rows] = delta
        return logprobs, totals

    def deltas(self, targets: Tensor, kept: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What `gradient` made of all tokens: of the first ones as it was kept, of the others again."""
        if len(kept) or not len(targets):
            yield slice(0, len(kept)), kept
        scratch = self.scratch(len(kept))
        for tile in self.tiles(len(kept)):
            delta = scratch[: tile.stop - tile.start]
            self.gradient(tile, targets, delta)
            yield tile, delta


def _logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and softmax as (totals, softmax * totals); `logits` is overwritten."""
    if _one_kernel(logits):
        logprobs = torch.log_softmax(logits, dim=1)
        picked = logprobs.gather(1, targets[:, None])[:, 0]
        return picked, torch.ones_like(picked), logprobs.exp_()
    # Several times faster on a CPU than log_softmax or logsumexp, and as exact.
    logits.sub_(logits.amax(dim=1, keepdim=True))
    picked = logits.gather(1, targets[:, None])[:, 0]
    totals = logits.exp_().sum(dim=1)
    return picked - totals.log(), totals, logits


def _one_kernel(logits: Tensor) -> bool:
    """A GPU's log_softmax goes over the tile once where the steps by themselves go over it four times."""
    return logits.is_cuda


def _whole(tensor: Tensor) -> Tensor:
    """A sharded parameter gathered; its gradients on all ranks are added up and sharded again."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


class _TargetLogprobs(torch.autograd.Function):
    """Inputs: targets, then the parts of a `_Layer`."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, *parts: Any) -> Tensor:
        layer = _Layer(*parts)
        _, hidden, weight, bias, reduced, b, *_ = ctx.needs_input_grad
        tokens, vocabulary = len(targets), len(layer.weight)
        keep = kept_rows(tokens, vocabulary, layer.weight) if weight or bias or b else 0
        kept, scratch = borrow(keep, vocabulary, layer.weight), layer.scratch(keep)
        logprobs = torch.empty(tokens, dtype=layer.wide, device=targets.device)
        totals = torch.empty_like(logprobs)
        by_hidden, by_reduced = [layer.hidden[:0]], [layer.hidden[:0, :1]]
        for tile in layer.tiles():
            delta = kept[tile] if tile.start < keep else scratch[: tile.stop - tile.start]
            logprobs[tile], totals[tile] = layer.gradient(tile, targets, delta)
            if hidden:
                by_hidden.append(_product(delta, layer.weight))
            if reduced and layer.b is not None:
                by_reduced.append(_product(delta, layer.b.to(delta.dtype)))
        ctx.kept, ctx.options = kept, (layer.scale, layer.softcap)
        tensors = (layer.hidden, layer.weight, layer.bias, layer.reduced, layer.b)
        saved = [torch.cat(found[1:] or found) for found in (by_hidden, by_reduced)]
        ctx.save_for_backward(targets, *tensors, totals, *saved)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        targets, *tensors, totals, by_hidden, by_reduced = ctx.saved_tensors
        layer = _Layer(*tensors, *ctx.options)
        factor = (grads[0] * -layer.scale / totals)[:, None]
        needed = ctx.needs_input_grad[1:6]
        found: list[Tensor | None] = [None] * 5
        found[0] = by_hidden * factor if needed[0] else None
        found[3] = by_reduced * factor if needed[3] else None
        # The gradients of weight, bias and b are one product: delta.T @ (factor * [hidden | 1 | reduced]).
        sides = {1: layer.hidden, 2: torch.ones_like(factor), 4: layer.reduced}
        wanted = {place: side * factor for place, side in sides.items() if side is not None and needed[place]}
        if wanted:
            kept, ctx.kept = ctx.kept, ctx.kept[:0]  # a second backward pass, if one is wanted, recomputes
            side = torch.cat(list(wanted.values()), dim=1).to(layer.weight.dtype)
            total = _sum_of_products((delta.T, side[tile]) for tile, delta in layer.deltas(targets, kept))
            give_back(kept)
            parts = total.split([s.shape[1] for s in wanted.values()], dim=1)
            found[1], found[2], found[4] = (dict(zip(wanted, parts, strict=True)).get(i) for i in (1, 2, 4))
        given = [
            grad.to(like.dtype).view_as(like) if need and grad is not None else None
            for need, grad, like in zip(needed, found, tensors, strict=True)
        ]
        return (None, *given, None, None)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """A matrix product summed in float32; its result float32 where the device can, else in the operands' dtype."""
    if left.is_cuda and left.dtype in _HALVES:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out=out)


def _sum_of_products(pairs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of left @ right in float32; a single product stays as it comes."""
    total = None
    for left, right in pairs:
        if total is None:
            total = _product(left, right)
        elif total.dtype == left.dtype and total.dtype not in _HALVES:
            total.addmm_(left, right)
        else:
            total = total.float().add_(_product(left, right))
    assert total is not None
    return total
