"""Optimisers with float32 master weights, and the learning-rate schedule.

A bfloat16 weight of 0.02 moves in steps of 1e-4; at lr 1e-6 most updates would round away. So the
optimiser works on float32 copies and bfloat16 weights are refreshed from them after every step.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Masters", "gradient_norm", "learning_rate", "make_optimizer"]


class Masters:
    """Float32 parameters the optimiser sees; gradients of all micro-batches accumulate in them.

    A float32 parameter is its own master. For others a hook moves each gradient into the master's
    as soon as autograd has it, so the low-precision gradient never accumulates and never lingers.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.live = [p for p in parameters if p.requires_grad]
        self.parameters = [self._master(p) for p in self.live]

    def _master(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if parameter.dtype == torch.float32:
            return parameter
        master = torch.nn.Parameter(parameter.detach().float())

        def move(p: Tensor) -> None:
            assert p.grad is not None
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

        parameter.register_post_accumulate_grad_hook(move)
        return master

    def forget_gradients(self) -> None:
        """No gradients, nor any that a backward pass which broke off left in a live parameter."""
        for parameter in (*self.live, *self.parameters):
            parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the live parameters, rounding to their dtype."""
        for live, master in zip(self.live, self.parameters, strict=True):
            if live is not master:
                live.copy_(master)


def make_optimizer(
    name: Literal["adamw", "rmsprop"],
    parameters: Iterable[Any],
    *,
    lr: float,
    weight_decay: float,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.999) or RMSprop (the DPO paper's; alpha 0.99), torch's own.

    Args:
        parameters: Parameters, or groups of them.
        eps: Of either.

    AdamW's fused kernel passes over the weights once, on a CPU as on CUDA; RMSprop has none.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, eps=eps, fused=True)
    return torch.optim.RMSprop(parameters, lr=lr, eps=eps)


def learning_rate(
    step: int, *, total: int, peak: float, warmup: float, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """Learning rate of update `step` (from 0) out of `total`.

    Linear warm-up reaches `peak` at the last warm-up step; then constant, or down to zero just
    after the last step, linearly or along a half cosine.

    Args:
        warmup: Share of `total` if below 1, else a number of steps.
    """
    warm = round(warmup * total) if warmup < 1 else round(warmup)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    done = (step - warm) / max(1, total - warm)
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> Float[Tensor, ""]:
    """Euclidean norm over all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
