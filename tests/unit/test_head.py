"""The tiled head equals log softmax over full logits, values and gradients."""

import pytest
import torch

from prefopt.model import head as head_module
from prefopt.model.head import Head, logits_tile, target_logprobs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_equals_full_logits(bias: bool, softcap: float | None, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_TILE_ELEMENTS", 16 * 50)  # tiles of 16 rows: three tiles, the last one short
    torch.manual_seed(0)
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    offset = torch.randn(50, requires_grad=True) if bias else None
    targets = torch.randint(0, 50, (40,))
    coefficients = torch.randn(40)
    inputs = [t for t in (hidden, weight, offset) if t is not None]

    logits = scale * torch.nn.functional.linear(hidden, weight, offset)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    plain = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    plain_grads = torch.autograd.grad((plain * coefficients).sum(), inputs)

    ours = target_logprobs(Head(weight, offset, scale, softcap), hidden, targets)
    our_grads = torch.autograd.grad((ours * coefficients).sum(), inputs)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_frozen_weight_gets_no_gradient_and_hidden_still_does() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(7, 4)
    target_logprobs(Head(weight, None, 1.0, None), hidden, torch.tensor([0, 1, 2, 3, 6])).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_extreme_logits_stay_exact() -> None:
    hidden = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [0.0]])
    logprobs = target_logprobs(Head(weight, None, 1.0, None), hidden, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -1e4]


def test_bfloat16_weight_gradient_is_accumulated_in_float32() -> None:
    # 600 tokens each add the same gradient; summed in bfloat16 it would stall well below the truth.
    torch.manual_seed(0)
    hidden = torch.ones(600, 4, dtype=torch.bfloat16)
    weight = torch.zeros(40_000, 4, dtype=torch.bfloat16, requires_grad=True)  # small tiles: several additions
    target_logprobs(Head(weight, None, 1.0, None), hidden, torch.zeros(600, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0, 0].item() == pytest.approx(600 * (1 - 1 / 40_000), rel=4e-3)


def test_logits_tile_is_float32_whatever_the_weights_are() -> None:
    tile = logits_tile(Head(torch.ones(3, 2, dtype=torch.bfloat16), None, 1.0, None), torch.ones(1, 2).bfloat16())
    assert tile.dtype == torch.float32
