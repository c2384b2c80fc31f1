"""On a card: its kernels against the same attention by segments, on the CPU in float32; head, blocks, sampling."""

import numpy as np
import pytest
import torch
from torch import Tensor

from architectures import ARCHITECTURES
from prefopt.data.pack import PackedBatch, pack
from prefopt.model.attention import segment_attention
from prefopt.model.attention_cuda import cuda_attention
from prefopt.model.head import Head, target_logprobs
from prefopt.model.logprobs import sequence_logprob_sum
from prefopt.model.paths import choose_path
from prefopt.model.policy import run_blocks
from prefopt.model.sample import sample
from tiny import model_of, random_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Over blocks of 128 slots; prompts longer and shorter than the windows; K from 1 to 4.
ROWS = [(300, 150, 40), (20, 10, 30), (1, 200, 7), (140, 130, 3, 129), (9, 8)]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a sum with unequal coefficients, as float32 on the CPU."""
    coefficients = torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out)
    grads = torch.autograd.grad((out.float() * coefficients).sum(), inputs)
    return [t.detach().float().cpu() for t in (out, *grads)]


def close(ours: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(
    ("dtype", "softcap", "sinks"),
    [
        (torch.bfloat16, None, False),  # flash attention
        (torch.float32, None, False),  # FlexAttention, as all that follow
        (torch.float32, 5.0, False),
        (torch.bfloat16, 5.0, False),
        (torch.bfloat16, None, True),
    ],
)
def test_kernels(dtype: torch.dtype, softcap: float | None, sinks: bool, window: int | None) -> None:
    batch = pack(random_groups(ROWS))
    torch.manual_seed(0)
    shape = (len(batch.input_ids), 32)
    states = [torch.randn(1, heads, *shape).to(dtype) for heads in (4, 2, 2)]
    sink = [torch.randn(4).to(dtype)] if sinks else []
    plain = [t.float().requires_grad_() for t in states + sink]
    on_card = [t.cuda().requires_grad_() for t in states + sink]
    q, k, v, *s_aux = plain
    truth, _ = segment_attention(
        torch.nn.Identity(),
        q,
        k,
        v,
        None,
        layout=batch.layout,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        s_aux=s_aux[0] if sinks else None,
    )
    q, k, v, *s_aux = on_card
    ours = cuda_attention(
        q,
        k,
        v,
        batch.to(torch.device("cuda")).layout,
        scaling=0.3,
        dropout=0.0,
        window=window,
        softcap=softcap,
        sinks=s_aux[0] if sinks else None,
    )
    assert ours is not None, "no kernel took it"
    close(with_gradients(ours, on_card), with_gradients(truth, plain), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_head(dtype: torch.dtype, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).to(dtype), (0.1 * torch.randn(1000, 64)).to(dtype)
    targets = torch.randint(0, 1000, (300,))
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float32)):
        inputs = [t.to(device, kind).requires_grad_() for t in (hidden, weight)]
        out = target_logprobs(Head(inputs[1], None, 0.5, softcap), inputs[0], targets.to(device))
        results.append(with_gradients(out, inputs))
    close(results[0], results[1], TOLERANCE[dtype])


def on_both(architecture: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module, PackedBatch]:
    """A model on the card, the same on the CPU in float32, and rows for them."""
    config, arguments, _ = ARCHITECTURES[architecture]
    wide = {"hidden_size": 64, "head_dim": 16} if "head_dim" in arguments else {"hidden_size": 64}
    card = model_of(architecture, **wide).to("cuda", dtype)  # type: ignore[arg-type]
    plain = model_of(architecture, **wide).to(dtype).float()  # type: ignore[arg-type]
    return card, plain, pack(random_groups([(30, 9, 14), (1, 12, 11), (7, 1, 3)]))


@pytest.mark.filterwarnings("ignore")  # the compiler's
@pytest.mark.parametrize("architecture", ["Llama", "Gemma 2", "GPT-OSS", "Mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_models_share_and_train(architecture: str, dtype: torch.dtype, compiled: bool) -> None:
    card, plain, batch = on_both(architecture, dtype)
    assert choose_path(card, batch.to(torch.device("cuda"))).path == "shared"
    run_blocks(card, recompute="none", compiled=compiled)  # type: ignore[arg-type]
    sums = []
    for model, device in ((card, "cuda"), (plain, "cpu")):
        scored = sequence_logprob_sum(model, batch.to(torch.device(device)), "shared")
        (scored * torch.linspace(-1, 2, len(scored), device=device)).sum().backward()
        sums.append(scored.detach().cpu())
    torch.testing.assert_close(sums[0], sums[1], atol=TOLERANCE[dtype] * 20, rtol=TOLERANCE[dtype])
    for ours, truth in zip(card.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (truth.grad is None)
        if ours.grad is not None and truth.grad is not None:
            close([ours.grad.float().cpu()], [truth.grad], 5 * TOLERANCE[dtype])


def test_samples_are_those_of_the_cpu() -> None:
    card, plain, _ = on_both("Llama", torch.float32)
    prompts = [np.arange(1, n, dtype=np.int32) for n in (4, 9, 30)]
    drawn = [
        sample(m, prompts, completions=4, max_new_tokens=12, temperature=1.0, stop_ids=frozenset({5}), seed=0)
        for m in (card, plain)
    ]
    assert [one.ids.tolist() for one in drawn[0]] == [one.ids.tolist() for one in drawn[1]]
