"""The tiled head equals log softmax over full logits, values and gradients."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.model import head as head_module
from prefopt.model import tiles
from prefopt.model.head import Head, HeadAdapter, logit_blocks, target_logprobs

TOKENS, VOCABULARY, WIDTH, RANK = 40, 50, 8, 3
KEPT = {"all kept": 1 << 30, "one tile kept": 20 * VOCABULARY * 8, "none kept": 0}


@pytest.fixture(params=KEPT)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles of 16 rows, the last one short, in blocks of two; none, some or all kept for the backward pass."""
    monkeypatch.setattr(tiles, "_ROWS", (1, 16))
    monkeypatch.setattr(tiles, "_BLOCK_ELEMENTS", VOCABULARY)
    monkeypatch.setattr(tiles, "_KEPT_BYTES_CPU", KEPT[request.param])


@pytest.fixture(params=["cpu steps", "one kernel"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch that CUDA takes, too."""
    monkeypatch.setattr(head_module, "_one_kernel", lambda _: request.param == "one kernel")


def make_head(
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    lora: bool = False,
    vocabulary: int = VOCABULARY,
) -> Head:
    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    weight, offset = parameter(vocabulary, WIDTH), parameter(vocabulary) if bias else None
    adapter = None
    if lora:
        adapter = HeadAdapter(parameter(RANK, WIDTH), parameter(vocabulary, RANK), 0.5, torch.nn.Identity())
    return Head(weight, offset, scale, softcap, adapter)


def leaves(head: Head) -> list[Tensor]:
    adapter = () if head.adapter is None else (head.adapter.a, head.adapter.b)
    return [t for t in (head.weight, head.bias, *adapter) if t is not None]


def plain_logits(head: Head, hidden: Tensor) -> Tensor:
    """The twin: everything at once, by autograd."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.adapter is not None:
        logits = logits + head.adapter.scale * (hidden @ head.adapter.a.T) @ head.adapter.b.T
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain_logprobs(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return plain_logits(head, hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def close(ours: Any, plain: Any, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=rtol)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.25, 2.0)])
@pytest.mark.usefixtures("small", "steps")
def test_equals_full_logits(bias: bool, softcap: float | None, scale: float, lora: bool) -> None:
    torch.manual_seed(0)
    head = make_head(bias=bias, scale=scale, softcap=softcap, lora=lora)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets, coefficients = torch.randint(0, VOCABULARY, (TOKENS,)), torch.randn(TOKENS)
    coefficients[3] = 0.0
    plain, ours = plain_logprobs(head, hidden, targets), target_logprobs(head, hidden, targets)
    close([ours], [plain])
    inputs = [hidden, *leaves(head)]
    mine, theirs = (torch.autograd.grad((v * coefficients).sum(), inputs) for v in (ours, plain))
    close(mine, theirs)
    with torch.no_grad():
        close([target_logprobs(head, hidden, targets)], [plain])


@pytest.mark.usefixtures("small")
def test_gradients_whatever_subset_is_wanted() -> None:
    torch.manual_seed(0)
    head = make_head(bias=True, softcap=3.0, lora=True)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets, coefficients = torch.randint(0, VOCABULARY, (TOKENS,)), torch.randn(TOKENS)
    inputs = [hidden, *leaves(head)]
    truth = torch.autograd.grad((plain_logprobs(head, hidden, targets) * coefficients).sum(), inputs)
    for wanted in itertools.product([False, True], repeat=len(inputs)):
        for leaf, want in zip(inputs, wanted, strict=True):
            leaf.requires_grad_(want)
        logprobs = target_logprobs(head, hidden, targets)
        assert logprobs.requires_grad == any(wanted)
        if any(wanted):
            chosen = [leaf for leaf, want in zip(inputs, wanted, strict=True) if want]
            expected = [grad for grad, want in zip(truth, wanted, strict=True) if want]
            close(torch.autograd.grad((logprobs * coefficients).sum(), chosen), expected)


@pytest.mark.usefixtures("small", "steps")
def test_float64_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    head = make_head(torch.float64, bias=True, scale=0.5, softcap=3.0, lora=True, vocabulary=7)
    hidden = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        adapter = HeadAdapter(a, b, 0.5, torch.nn.Identity())
        result: Tensor = target_logprobs(Head(weight, bias, 0.5, 3.0, adapter), hidden, torch.tensor([0, 6, 3, 3, 1]))
        return result

    assert logprobs(hidden, *leaves(head)).dtype == torch.float64
    assert torch.autograd.gradcheck(logprobs, (hidden, *leaves(head)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.usefixtures("small")
def test_low_precision_is_near_float32(dtype: torch.dtype, tolerance: float) -> None:
    """Against float32 from the same (rounded) operands; a product's result is rounded to 8 or 11 bits."""
    torch.manual_seed(0)
    head = make_head(dtype, bias=True, lora=True)
    wide = make_head(bias=True, lora=True)
    with torch.no_grad():
        for to, source in zip(leaves(wide), leaves(head), strict=True):
            to.copy_(source)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    wide_hidden = hidden.detach().float().requires_grad_()
    targets, coefficients = torch.randint(0, VOCABULARY, (TOKENS,)), torch.randn(TOKENS)
    ours, plain = target_logprobs(head, hidden, targets), plain_logprobs(wide, wide_hidden, targets)
    assert ours.dtype == torch.float32
    close([ours], [plain], atol=10 * tolerance, rtol=tolerance)
    mine = torch.autograd.grad((ours * coefficients).sum(), [hidden, *leaves(head)])
    truth = torch.autograd.grad((plain * coefficients).sum(), [wide_hidden, *leaves(wide)])
    for grad, true in zip(mine, truth, strict=True):
        assert grad.dtype == dtype
        assert (grad.float() - true).norm() <= tolerance * true.norm()


def test_no_targets_give_no_log_probabilities_and_zero_gradients() -> None:
    head = make_head(bias=True, lora=True)
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    logprobs = target_logprobs(head, hidden, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == (0,)
    for leaf, grad in zip(leaves(head), torch.autograd.grad(logprobs.sum(), leaves(head)), strict=True):
        assert grad.shape == leaf.shape and not grad.any()
    with torch.no_grad():
        assert target_logprobs(head, hidden, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_a_graph_can_be_used_twice_and_other_calls_may_come_between() -> None:
    """Kept tiles are given back after the first backward pass; the second recomputes them."""
    torch.manual_seed(0)
    head = make_head()
    hidden = torch.randn(TOKENS, WIDTH)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    first, second = (target_logprobs(head, hidden * k, targets).sum() for k in (1, 2))
    truth = [torch.autograd.grad(plain_logprobs(head, hidden * k, targets).sum(), head.weight)[0] for k in (1, 2)]
    ones = torch.autograd.grad(first, head.weight, retain_graph=True)
    target_logprobs(head, hidden * 3, targets).sum().backward()
    twice = torch.autograd.grad(first, head.weight)
    close([*ones, *twice, *torch.autograd.grad(second, head.weight)], [truth[0], truth[0], truth[1]])


def test_scoring_keeps_nothing_and_frozen_weights_keep_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def borrow(rows: int, columns: int, like: Tensor) -> Tensor:
        sizes.append(rows)
        return tiles.borrow(rows, columns, like)

    monkeypatch.setattr(head_module, "borrow", borrow)
    head, targets = make_head(), torch.zeros(5, dtype=torch.long)
    hidden = torch.randn(5, WIDTH, requires_grad=True)
    with torch.no_grad():
        assert target_logprobs(head, hidden, targets).grad_fn is None
    assert sizes == []
    head.weight.requires_grad_(False)
    target_logprobs(head, hidden, targets).sum().backward()
    head.weight.requires_grad_(True)
    target_logprobs(head, hidden, targets).sum().backward()
    assert sizes == [0, 5]


def test_extreme_logits_stay_exact() -> None:
    hidden = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [0.0]])
    logprobs = target_logprobs(Head(weight, None, 1.0, None), hidden, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -1e4]


@pytest.mark.usefixtures("small")
def test_bfloat16_weight_gradient_is_accumulated_in_float32() -> None:
    # 600 tokens each add the same gradient; summed in bfloat16 it would stall well below the truth.
    hidden = torch.ones(600, 4, dtype=torch.bfloat16)
    weight = torch.zeros(4_000, 4, dtype=torch.bfloat16, requires_grad=True)  # 16 rows a tile: 38 additions
    target_logprobs(Head(weight, None, 1.0, None), hidden, torch.zeros(600, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0, 0].item() == pytest.approx(600 * (1 - 1 / 4_000), rel=4e-3)


@pytest.mark.usefixtures("small")
def test_logits_come_in_float32_a_few_rows_at_a_time() -> None:
    head = make_head(torch.bfloat16, softcap=3.0)
    hidden = torch.randn(TOKENS, WIDTH).bfloat16()
    pieces = list(logit_blocks_copied(head, hidden))
    assert len(pieces) > 3 and all(piece.dtype == torch.float32 for piece in pieces)
    close([torch.cat(pieces)], [plain_logits(head, hidden).float()], atol=2e-2, rtol=2e-2)


def logit_blocks_copied(head: Head, hidden: Tensor) -> Iterator[Tensor]:
    for _, logits in logit_blocks(head, hidden):
        yield logits.clone()


@pytest.mark.parametrize("vocabulary", [97, 32_000, 151_936, 1_000_000])
def test_tiles_and_what_is_kept_fit_the_memory(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_memory", lambda _: 8 << 30)
    cpu, weight = torch.device("cpu"), torch.zeros(1, dtype=torch.bfloat16)
    rows = tiles.tile_rows(vocabulary, cpu)
    assert 64 <= rows <= 4096
    for tokens in (0, 1, 1_000, 100_000):
        kept = tiles.kept_rows(tokens, vocabulary, weight)
        assert kept == tokens or kept % rows == 0
        assert kept * vocabulary * 2 <= 512 << 20
        assert kept == tokens or (kept + rows) * vocabulary * 2 > 512 << 20


def test_memory_is_read_from_the_machine() -> None:
    assert tiles._memory(torch.device("cpu")) > 1 << 28
