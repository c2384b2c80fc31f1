"""Sequence log-probabilities and gradients equal transformers' own, one sequence at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.data.group import CompletionGroup
from prefopt.data.pack import pack
from prefopt.model.logprobs import Path, choose_path, plain_attention, sequence_logprob_sum
from tiny import ARCHITECTURES, UNSHARABLE, completion, group, model_of, random_groups

# Prompts longer and shorter than the windows, one-token prompts and completions, K = 1, 2 and 3,
# and a completion in which only some tokens are trained on.
GROUPS = [
    *random_groups([(12, 9, 4), (1, 2, 11), (7, 1, 1), (9, 8), (3, 5, 6, 2)]),
    group([5, 6, 7, 8], completion(1, 2, 3, 4, 5, trainable=[True, False, False, True, True]), row=6),
]


def one_at_a_time(model: PreTrainedModel, groups: list[CompletionGroup]) -> Tensor:
    """What transformers itself says: a forward pass per sequence, log softmax over full logits."""
    sums = []
    for g in groups:
        for c in g.completions:
            ids = torch.tensor([[*g.prompt_ids.tolist(), *c.ids.tolist()]])
            logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            at = [len(g.prompt_ids) + i for i in range(len(c.ids)) if c.trainable[i]]
            sums.append(sum((logprobs[i - 1, ids[0, i]] for i in at), start=torch.zeros(())))
    return torch.stack(sums)


def gradients(model: PreTrainedModel, sums: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    model.set_attn_implementation(plain_attention(model))
    values = sums()
    # Unequal coefficients, as a preference loss gives, so that swapped sequences show.
    (values * torch.linspace(-1, 2, len(values))).sum().backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return values.detach(), grads


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_and_gradients_equal_transformers(architecture: str, path: Path) -> None:
    model = model_of(architecture)
    batch = pack(GROUPS)
    truth, true_grads = gradients(model, lambda: one_at_a_time(model, GROUPS))
    ours, our_grads = gradients(model, lambda: sequence_logprob_sum(model, batch, path))
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-5)
    assert our_grads.keys() == true_grads.keys()
    for name, grad in true_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharable_models_take_the_shared_path(architecture: str) -> None:
    choice = choose_path(model_of(architecture), pack(GROUPS))
    assert choice.path == "shared"
    assert choice.max_difference <= 1e-4


@pytest.mark.parametrize("architecture", UNSHARABLE)
def test_models_that_cannot_share_fall_back_to_the_padded_path(architecture: str) -> None:
    model = model_of(architecture)
    batch = pack(GROUPS)
    choice = choose_path(model, batch)
    assert choice.path == "padded"
    assert choice.reason != "checked against transformers"
    truth, _ = gradients(model, lambda: one_at_a_time(model, GROUPS))
    ours, _ = gradients(model, lambda: sequence_logprob_sum(model, batch, "padded"))
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-5)


def test_the_first_batch_catches_a_model_that_only_seems_to_share() -> None:
    model = model_of("Llama")
    layer = model.model.layers[0].self_attn

    def peek(module: torch.nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        neighbour = torch.zeros_like(out[0])
        neighbour[:, 21:] = out[0][:, :-21]  # 21 slots back: only another sequence stands there
        return (out[0] + neighbour, *out[1:])

    layer.register_forward_hook(peek)
    choice = choose_path(model, pack(GROUPS))
    assert choice.path == "padded"
    assert "differs" in choice.reason
