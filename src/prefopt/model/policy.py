"""From a loaded model to the one that is trained: dropout off, adapters on, blocks compiled or recomputed."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # defines torch_attn._varlen_attn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.config import TrainConfig
from prefopt.errors import ModelError
from prefopt.model.load import add_lora
from prefopt.progress import say

__all__ = ["compiles", "make_policy", "run_blocks"]

_WORTH_COMPILING = 100  # steps: compiling takes about as long as a few dozen of them save

# What recomputing would cost most: products with weights and whole attention kernels. Batched products
# are not among them: attention written out has scores of every query with every key.
_EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
]


def make_policy(model: PreTrainedModel, config: TrainConfig, *, steps: int = 0) -> torch.nn.Module:
    """Make `model` trainable in place, wholly or through a LoRA adapter (the model is then peft's).

    The model's own dropout is switched off, as in the reference code: log-probabilities are
    compared with a reference that has none. A LoRA adapter's dropout is the one asked for, and all
    that training mode is for.

    Args:
        steps: Optimiser steps ahead, which decide whether compiling pays.

    Raises:
        ModelError: blocks are to be compiled or recomputed, and none are found.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    model.requires_grad_(True)
    policy: torch.nn.Module = model
    if config.lora_rank is not None:
        policy = add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha or config.lora_rank,
            dropout=config.lora_dropout or 0.0,
            targets=config.lora_targets,
            seed=config.seed,
        )
    compiled = compiles(config, model.device, steps)
    run_blocks(model, recompute=config.checkpoint_activations, compiled=compiled)
    if compiled:
        say("transformer blocks: compiled; the first steps take longer")
    policy.train(bool(config.lora_dropout))
    return policy


def compiles(config: TrainConfig, device: torch.device, steps: int) -> bool:
    """Whether blocks are compiled: if asked for, or on CUDA in a run long enough to pay for it."""
    if config.compile_blocks is None:
        return device.type == "cuda" and steps >= _WORTH_COMPILING and config.checkpoint_activations != "selective"
    return config.compile_blocks


def run_blocks(
    model: PreTrainedModel,
    *,
    recompute: Literal["none", "selective", "all"],
    compiled: bool,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compile every transformer block of `model`, or keep fewer of its activations, in place.

    Both touch training alone: without gradients (evaluation, sampling with its cache) a block runs
    as it is. A recomputed block draws the same dropout again. Names of weights do not change.

    Args:
        recompute: In the backward pass; selective: all but products with weights and attention.

    Raises:
        ModelError: the model has no blocks that transformers could recompute either.
    """
    if recompute == "none" and not compiled:
        return
    blocks = _blocks(model)
    if not blocks:
        raise ModelError(
            "The model has no transformer blocks to compile or to recompute.",
            got=type(model).__name__,
            todo="Leave out --checkpoint-activations and --compile-blocks.",
        )
    # transformers adds an expert's bias (GPT-OSS) in place to the product, which then cannot be kept.
    biased_experts = any(name.endswith("_proj_bias") for name, _ in model.named_parameters())
    kept = [op for op in _EXPENSIVE if not (biased_experts and op is torch.ops.aten._grouped_mm.default)]
    for block in blocks:
        block.forward = _training_forward(block.forward, recompute, kept, compiled, backend)


def _blocks(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The outermost layers that can be run again on their own."""
    found: dict[str, GradientCheckpointingLayer] = {}
    for name, module in model.named_modules():  # parents come first
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def _training_forward(
    plain: Callable[..., Any],
    recompute: str,
    kept: list[Any],
    compiled: bool,
    backend: str | Callable[..., Any],
) -> Callable[..., Any]:
    run = torch.compile(plain, dynamic=True, backend=backend) if compiled else plain
    if recompute == "all":
        run = partial(checkpoint, run, use_reentrant=False)
    elif recompute == "selective":
        selective = partial(create_selective_checkpoint_contexts, kept)
        run = partial(checkpoint, run, use_reentrant=False, context_fn=selective)
    return lambda *args, **kwargs: (run if torch.is_grad_enabled() else plain)(*args, **kwargs)
