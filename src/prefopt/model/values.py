"""The value model of PPO: what a prompt and the tokens so far will still earn."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.config import PPOConfig
from prefopt.data.pack import PackedBatch
from prefopt.errors import ConfigError
from prefopt.model.load import LoadedModel
from prefopt.model.logprobs import Path, plain_model, target_hidden
from prefopt.model.policy import make_policy
from prefopt.model.reward import load_reward_model

__all__ = ["ValueModel", "value_model"]


class ValueModel(torch.nn.Module):
    """A backbone of its own and a linear head in float32, which starts at zero.

    Attributes:
        backbone: A transformers model, or peft's around one; its own head is not used.
        path: How batches are laid out for it (`model.paths`).
    """

    def __init__(self, backbone: torch.nn.Module, width: int, path: Path) -> None:
        super().__init__()
        self.backbone, self.path = backbone, path
        plain = plain_model(backbone)
        unused = plain.get_output_embeddings()
        if unused is not None and unused.weight is not plain.get_input_embeddings().weight:
            unused.requires_grad_(False)
        self.head = torch.nn.Linear(width, 1, device=plain.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: PackedBatch) -> Float[Tensor, " targets"]:
        """The value before each target of `batch`, in their order."""
        hidden = target_hidden(self.backbone, batch, self.path)
        values: Tensor = self.head(hidden.float())[:, 0]
        return values


def value_model(config: PPOConfig, loaded: LoadedModel, path: Path, steps: int) -> ValueModel:
    """A value model that starts as the policy does, or as the reward model, head included.

    Args:
        path: The policy's; a reward model has its own.

    Raises:
        ConfigError: the reward model reads other tokens than the policy.
    """
    if config.value_from == "policy":
        width = plain_model(loaded.model).get_output_embeddings().weight.shape[1]
        return ValueModel(make_policy(copy.deepcopy(loaded.model), config, steps=steps), width, path)
    reward = load_reward_model(config.reward, dtype=loaded.model.dtype, device=loaded.model.device)
    if not loaded.tokenizer.get_vocab().items() <= reward.tokenizer.get_vocab().items():
        raise ConfigError(
            "The value model cannot start as the reward model, which has another vocabulary.",
            where="value_from",
            got=f"{config.reward} beside {config.model}",
            expected="a reward model with the policy's tokens",
            todo="Use --value-from policy.",
        )
    head = reward.model.score
    assert isinstance(head, torch.nn.Linear)
    value = ValueModel(make_policy(reward.model, config, steps=steps), head.weight.shape[1], reward.path)
    head.requires_grad_(False)
    with torch.no_grad():
        value.head.weight.copy_(head.weight)
        value.head.bias.fill_(reward.bias + (0.0 if head.bias is None else float(head.bias)))
    return value
