"""What the CUDA kernels are given is right, shown on the CPU: indices, windows, masks, blocks, the choice.

Plain twins stand in for the kernels: a loop for variable-length flash attention, softmax over all
slots for FlexAttention's masks. FlexAttention itself runs too, without its compiler.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from prefopt.data.pack import PackedBatch, pack
from prefopt.model.attention import segment_attention
from prefopt.model.attention_cuda import BLOCK, Kernel, block_mask, choose_kernel, flex, mask_function, varlen
from tiny import random_groups

# Prompts longer and shorter than the windows, one-token prompts and completions, K from 1 to 4.
SHORT = [(12, 9, 4), (1, 2, 11), (7, 1, 1), (9, 8), (3, 5, 6, 2, 1)]
# Several blocks of 128 slots; one group inside a block, one over four.
LONG = [(300, 150, 40), (20, 10, 30), (1, 200, 7), (140, 130, 3, 129)]
WINDOWS = [None, 1, 5, 100]


def states(batch: PackedBatch, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    slots = len(batch.input_ids)
    query, key, value = (torch.randn(1, h, slots, dim, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    return query, key, value


def by_segment(batch: PackedBatch, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    out, _ = segment_attention(
        torch.nn.Identity(), query, key, value, None, layout=batch.layout, scaling=0.3, sliding_window=window
    )
    return out


def assert_same(ours: Tensor, truth: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, truth, atol=2e-6, rtol=1e-5)
    # Unequal coefficients, so that swapped slots show.
    coefficients = torch.linspace(-1, 2, truth.numel()).view_as(truth)
    grads, true_grads = (torch.autograd.grad((out * coefficients).sum(), inputs) for out in (ours, truth))
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, atol=1e-5, rtol=1e-5)


def looped_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Variable-length attention as flash attention defines it, one sequence at a time."""
    assert int(cu_seq_q.diff().max()) == max_q
    assert int(cu_seq_k.diff().max()) == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    outs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)  # [heads, queries, dim]
        k, v = (states[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1) for states in (key, value))
        k, v = (states.repeat_interleave(len(q) // len(k), dim=0) for states in (k, v))
        # Bottom right: the last query and the last key stand at the same place.
        distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        hidden = (distance < -right) | ((distance > left) if left >= 0 else torch.tensor(False))
        scores = (q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)).masked_fill(hidden, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("grouped_heads", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_variable_lengths_equal_attention_by_segments(window: int | None, grouped_heads: bool) -> None:
    batch = pack(random_groups(SHORT))
    inputs = states(batch)
    ours = varlen(*inputs, batch.layout, scaling=0.3, window=window, kernel=looped_varlen, grouped_heads=grouped_heads)
    assert_same(ours, by_segment(batch, *inputs, window), *inputs)


def test_rows_without_sharing_need_no_gathering() -> None:
    batch = pack(random_groups([(5, 7), (1, 3), (9, 2)]))
    inputs = states(batch)
    ours = varlen(*inputs, batch.layout, scaling=0.3, window=4, kernel=looped_varlen)
    assert_same(ours, by_segment(batch, *inputs, 4), *inputs)


def visible(batch: PackedBatch, window: int | None) -> Tensor:
    """Who sees whom, from the sequences themselves: whoever shares one and does not come later."""
    slots = len(batch.input_ids)
    seen = torch.zeros(slots, slots, dtype=torch.bool)
    for prompt, own in batch.spans:
        members = torch.tensor([*prompt, *own])
        position = torch.arange(len(members))
        near = position[:, None] - position
        seen[members[:, None], members] |= (near >= 0) & (near < (window or slots))
    return seen


@pytest.mark.parametrize("lengths", [SHORT, LONG])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_function_lets_each_query_see_its_own_history(
    window: int | None, lengths: list[tuple[int, ...]]
) -> None:
    batch = pack(random_groups(lengths))
    slots = len(batch.input_ids)
    padded = -(-slots // BLOCK) * BLOCK
    at = torch.arange(padded)
    function = mask_function(batch.layout, window, torch.device("cpu"))
    mask = function(torch.tensor(0), torch.tensor(0), at[:, None], at[None])
    expected = torch.eye(padded, dtype=torch.bool)  # a slot of the filling sees itself alone
    expected[:slots, :slots] = visible(batch, window)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("window", WINDOWS)
def test_masked_attention_over_the_row_equals_attention_by_segments(window: int | None) -> None:
    batch = pack(random_groups(SHORT))
    query, key, value = inputs = states(batch)
    k, v = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    scores = (query @ k.transpose(2, 3) * 0.3).masked_fill(~visible(batch, window), float("-inf"))
    assert_same((scores.softmax(-1) @ v).transpose(1, 2), by_segment(batch, *inputs, window), *inputs)


@pytest.mark.parametrize("window", [None, 50, 128, 200])
def test_every_block_with_something_to_see_is_visited(window: int | None) -> None:
    batch = pack(random_groups(LONG))
    blocks = block_mask(batch.layout, window, torch.device("cpu"))
    count = blocks.shape[-1] // BLOCK
    seen = torch.zeros(count * BLOCK, count * BLOCK, dtype=torch.bool)
    seen[: len(batch.input_ids), : len(batch.input_ids)] = visible(batch, window)
    seen |= torch.eye(len(seen), dtype=torch.bool)
    tiles = seen.view(count, BLOCK, count, BLOCK).transpose(1, 2).flatten(2)  # [blocks, blocks, pairs]
    partial, whole = torch.zeros(2, count, count, dtype=torch.bool)
    assert blocks.full_kv_num_blocks is not None and blocks.full_kv_indices is not None
    for table, number, index in (
        (partial, blocks.kv_num_blocks, blocks.kv_indices),
        (whole, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for row in range(count):
            table[row, index[0, 0, row, : number[0, 0, row]].long()] = True
    assert not (partial & whole).any()
    assert torch.equal(partial | whole, tiles.any(2))
    assert torch.equal(whole & tiles.all(2), whole), "the mask would be skipped where it hides something"
    if window is None:
        # The 300-slot prompt's first blocks see themselves from below, and so does its second completion.
        assert whole[1, 0] and whole[2, :2].all()
        assert int(whole.sum()) >= 4


# Without its compiler FlexAttention is traced through torch's own inside, which warns at several places.
TORCHS_OWN = pytest.mark.filterwarnings("ignore")


def plain_flex(counter: CompileCounterWithBackend) -> Callable[..., object]:
    compiled: Callable[..., object] = torch.compile(flex_attention, dynamic=True, backend=counter)
    return compiled


@TORCHS_OWN
@torch.no_grad()
def test_flex_attention_equals_attention_by_segments_and_is_traced_once() -> None:
    counter = CompileCounterWithBackend("eager")
    kernel = plain_flex(counter)
    for lengths in (LONG[:2], LONG[1:], LONG):
        batch = pack(random_groups(lengths))
        inputs = states(batch)
        for window in WINDOWS:
            ours = flex(*inputs, batch.layout, scaling=0.3, window=window, kernel=kernel)
            truth = by_segment(batch, *inputs, window)
            torch.testing.assert_close(ours, truth, atol=2e-6, rtol=1e-5)
    assert counter.frame_count == 1


@TORCHS_OWN
@torch.no_grad()
def test_flex_attention_with_capped_scores_and_with_sinks() -> None:
    batch = pack(random_groups(LONG[1:]))
    query, key, value = states(batch)
    kernel = plain_flex(CompileCounterWithBackend("eager"))
    k, v = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    scores = query @ k.transpose(2, 3) * 2.0
    hidden = ~visible(batch, 60)

    ours = flex(query, key, value, batch.layout, scaling=2.0, window=60, softcap=3.0, kernel=kernel)
    capped = (3.0 * torch.tanh(scores / 3.0)).masked_fill(hidden, float("-inf"))
    torch.testing.assert_close(ours, (capped.softmax(-1) @ v).transpose(1, 2), atol=2e-6, rtol=1e-5)

    sinks = torch.tensor([-1.0, 0.5, 3.0, 8.0])
    ours = flex(query, key, value, batch.layout, scaling=2.0, window=60, sinks=sinks, kernel=kernel)
    # The sink is one more key, whose weight goes nowhere.
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores.masked_fill(hidden, float("-inf")), column], dim=-1).softmax(-1)[..., :-1]
    torch.testing.assert_close(ours, (weights @ v).transpose(1, 2), atol=2e-6, rtol=1e-5)


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "needs", "capability", "triton", "kernel"),
    [
        (HALF, 128, 128, "", (9, 0), True, "varlen"),
        (torch.float16, 64, 64, "", (8, 0), True, "varlen"),
        (HALF, 80, 80, "", (8, 9), True, "varlen"),  # a multiple of 8
        (HALF, 256, 256, "", (9, 0), False, "varlen"),  # needs no Triton
        (HALF, 224, 224, "", (9, 0), True, "flex"),  # not on every card
        (HALF, 20, 20, "", (9, 0), True, "flex"),
        (HALF, 320, 320, "", (9, 0), True, "flex"),
        (HALF, 192, 128, "", (9, 0), True, "flex"),  # values of another width
        (HALF, 128, 128, "", (7, 5), True, "flex"),  # Turing
        (FULL, 128, 128, "", (9, 0), True, "flex"),
        (HALF, 128, 128, "capped", (9, 0), True, "flex"),
        (HALF, 64, 64, "sinks", (9, 0), True, "flex"),
        (HALF, 64, 64, "dropout", (9, 0), True, "segments"),
        (FULL, 64, 64, "", (9, 0), False, "segments"),
        (FULL, 8, 8, "", (9, 0), True, "segments"),  # too narrow for Triton's products
        (HALF, 8, 8, "", (9, 0), True, "varlen"),
    ],
)
def test_the_choice_of_kernel(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    needs: str,
    capability: tuple[int, int],
    triton: bool,
    kernel: Kernel,
) -> None:
    chosen = choose_kernel(
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        capped=needs == "capped",
        sinks=needs == "sinks",
        dropout=needs == "dropout",
        capability=capability,
        triton=triton,
    )
    assert chosen == kernel
