"""The output head: log-probabilities of given targets without ever holding [tokens, vocab] logits.

Targets are processed in tiles of tokens, each over the WHOLE vocabulary. The backward pass
recomputes a tile's logits, turns them into their gradient in place, and accumulates the weight's
gradient in float32. Values are float32 whatever the model's dtype.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.errors import ModelError

__all__ = ["Head", "head_of", "logits_tile", "target_logprobs", "tile_rows"]

_TILE_ELEMENTS = 1 << 24  # logits of one tile: 64 MiB in float32


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), the parts that exist."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    scale: float
    softcap: float | None


def head_of(model: PreTrainedModel) -> Head:
    """The head of a transformers causal LM, with what its forward pass does to the logits.

    `logit_scale` multiplies (Cohere), `logits_scaling` divides (Granite), `final_logit_softcapping`
    caps (Gemma 2). That this is all is verified on a run's first batch.

    Raises:
        ModelError: the output embedding is not a plain linear layer.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear:
        raise ModelError(
            "The model's output head is not a plain linear layer.",
            got=type(layer).__name__,
            expected="torch.nn.Linear",
            todo="If an adapter sits on the head, leave lm_head out of lora_targets.",
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, float(softcap) if softcap else None)


def tile_rows(vocabulary: int) -> int:
    """Tokens in one tile."""
    return max(16, min(1024, _TILE_ELEMENTS // vocabulary))


def logits_tile(head: Head, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
    """Final logits of a tile, in float32."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def target_logprobs(
    head: Head, hidden: Float[Tensor, "targets hidden"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """log softmax(logits)[target] for each target, float32; differentiable in hidden, weight and bias."""
    result: Tensor = _TargetLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head.scale, head.softcap
    )
    return result


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        head = Head(weight, bias, scale, softcap)
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(logprobs)
        for tile in _tiles(len(targets), len(weight)):
            logits = logits_tile(head, hidden[tile])
            picked = logits.gather(1, targets[tile, None])[:, 0]
            # amax, exp, sum: several times faster on a CPU than torch.logsumexp, and as exact.
            top = logits.amax(dim=1)
            normaliser[tile] = logits.sub_(top[:, None]).exp_().sum(dim=1).log_().add_(top)
            logprobs[tile] = picked - normaliser[tile]
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.head = (scale, softcap)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        head = Head(weight, bias, *ctx.head)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for tile in _tiles(len(targets), len(weight)):
            delta = _logits_gradient(head, hidden[tile], targets[tile], normaliser[tile], grad[tile])
            if grad_bias is not None:
                grad_bias += delta.sum(dim=0)
            low = delta.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[tile] = low @ weight
            if grad_weight is not None:
                if low.dtype == torch.float32:
                    grad_weight.addmm_(low.T, hidden[tile])
                else:
                    grad_weight += low.T @ hidden[tile]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits_gradient(
    head: Head, hidden: Tensor, targets: Tensor, normaliser: Tensor, grad: Tensor
) -> Float[Tensor, "tokens vocab"]:
    """Gradient with respect to hidden @ weight.T + bias: grad * (onehot - softmax), through cap and scale."""
    logits = logits_tile(head, hidden)
    through = None if head.softcap is None else 1 - (logits / head.softcap).square_()
    delta = logits.sub_(normaliser[:, None]).exp_().mul_(-grad[:, None])
    delta.scatter_add_(1, targets[:, None], grad[:, None])
    if through is not None:
        delta *= through
    return delta.mul_(head.scale) if head.scale != 1.0 else delta


def _tiles(tokens: int, vocabulary: int) -> list[slice]:
    rows = tile_rows(vocabulary)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
