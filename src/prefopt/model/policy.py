"""From a loaded model to the one that is trained: dropout off, adapters on, activations checkpointed."""

import torch
from transformers import PreTrainedModel

from prefopt.config import TrainConfig
from prefopt.model.load import add_lora

__all__ = ["make_policy"]


def make_policy(model: PreTrainedModel, config: TrainConfig) -> torch.nn.Module:
    """Make `model` trainable in place, wholly or through a LoRA adapter (the model is then peft's).

    The model's own dropout is switched off, as in the reference code: log-probabilities are
    compared with a reference that has none. A LoRA adapter's dropout is the one asked for.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    model.requires_grad_(True)
    if config.checkpoint_activations:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # its older name
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank is None:
        return model
    adapted: torch.nn.Module = add_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha or config.lora_rank,
        dropout=config.lora_dropout or 0.0,
        targets=config.lora_targets,
        seed=config.seed,
    )
    return adapted
