"""Compiled and recomputed blocks give the values and gradients of plain ones, and do what they are for."""

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from architectures import ARCHITECTURES
from prefopt.config import DPOConfig
from prefopt.data.pack import PackedBatch, pack
from prefopt.errors import ModelError
from prefopt.model.logprobs import Path as Way
from prefopt.model.logprobs import sequence_logprob_sum, target_hidden
from prefopt.model.policy import compiles, make_policy, run_blocks
from tiny import model_of, random_groups

ROWS = [pack(random_groups(lengths)) for lengths in ([(12, 9, 4), (1, 2, 11)], [(7, 1, 3), (9, 8), (3, 5, 6, 2)])]
Recompute = Literal["none", "selective", "all"]


def gradients(model: torch.nn.Module, batch: PackedBatch, way: Way = "shared") -> dict[str, Tensor]:
    """Values under "" and gradients by name, of unequal coefficients, so that swapped sequences show."""
    model.zero_grad()
    torch.manual_seed(5)  # dropout
    values = sequence_logprob_sum(model, batch, way)
    (values * torch.linspace(-1, 2, len(values))).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"": values.detach(), **found}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("recompute", "products", "activations"),
    [
        # Two layers of 7 products with weights, each with two in the backward pass: 2 * 7 * 3.
        ("none", 42, 2),
        ("selective", 42, 4),
        # The last of a block is not run again: nothing but the block's output needs it.
        ("all", 42 + 2 * 6, 4),
    ],
)
def test_what_is_computed_again(recompute: Recompute, products: int, activations: int) -> None:
    model = model_of("Llama")
    run_blocks(model, recompute=recompute, compiled=False)
    with _Operations() as operations:
        target_hidden(model, ROWS[0], "shared").sum().backward()
    assert operations.counts["mm"] == products
    assert operations.counts["silu"] == activations


@pytest.mark.parametrize("recompute", ["selective", "all"])
@pytest.mark.parametrize("architecture", [name for name, what in ARCHITECTURES.items() if what.paths[0] == "shared"])
def test_recomputing_changes_no_bit(architecture: str, recompute: Recompute) -> None:
    model = model_of(architecture)
    ways: tuple[Way, ...] = ("shared", "padded")
    plain = [gradients(model, ROWS[0], way) for way in ways]
    run_blocks(model, recompute=recompute, compiled=False)
    for truth, way in zip(plain, ways, strict=True):
        ours = gradients(model, ROWS[0], way)
        assert ours.keys() == truth.keys()
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def adapted(recompute: Recompute) -> torch.nn.Module:
    config = DPOConfig(
        model="m",
        data=("d",),
        out=Path("o"),
        beta=0.1,
        lora_rank=2,
        lora_dropout=0.5,
        lora_targets=("q_proj",),
        checkpoint_activations=recompute,
    )
    policy = make_policy(model_of("Llama"), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    policy.train()
    return policy


@pytest.mark.parametrize("recompute", ["selective", "all"])
def test_an_adapters_dropout_is_drawn_again_alike(recompute: Recompute) -> None:
    truth, ours = gradients(adapted("none"), ROWS[0]), gradients(adapted(recompute), ROWS[0])
    assert ours.keys() == truth.keys()
    assert all(torch.equal(ours[name], truth[name]) for name in truth)
    assert not torch.equal(truth[""], gradients(adapted("none").eval(), ROWS[0])[""]), "no dropout was drawn"


@pytest.mark.filterwarnings("ignore")  # the compiler's own, about torch's and transformers' inside
@pytest.mark.parametrize(("architecture", "recompute"), [("Llama", "none"), ("Gemma 2", "all")])
def test_compiled_blocks_equal_plain_ones_and_are_compiled_once(architecture: str, recompute: Recompute) -> None:
    model = model_of(architecture)
    names = list(model.state_dict())
    plain = [gradients(model, batch) for batch in ROWS]
    counter = CompileCounterWithBackend("aot_eager")
    run_blocks(model, recompute=recompute, compiled=True, backend=counter)
    compiled = []
    for batch, truth in zip(ROWS, plain, strict=True):
        ours = gradients(model, batch)
        compiled.append(counter.frame_count)
        assert ours.keys() == truth.keys()
        for name, tensor in truth.items():  # decomposed operations round differently
            torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=1e-4)
    assert compiled[0] > 0
    assert compiled[1] == compiled[0], "compiled again for other lengths"
    assert list(model.state_dict()) == names

    with torch.no_grad():
        sequence_logprob_sum(model, pack(random_groups([(30, 4, 2)])), "shared")
        model.set_attn_implementation("eager")
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, pad_token_id=0)  # type: ignore[operator]
    assert counter.frame_count == compiled[0], "evaluation and sampling run as they are"


@pytest.mark.filterwarnings("ignore")
def test_all_layers_share_what_was_compiled() -> None:
    """torch gives up on a function after eight versions of it: layers must not each have their own."""
    counts = []
    for layers in (2, 12):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = model_of("Llama", num_hidden_layers=layers)
        run_blocks(model, recompute="none", compiled=True, backend=counter)
        gradients(model, ROWS[0])
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore")
def test_an_adapters_blocks_can_be_compiled() -> None:
    truth = gradients(adapted("none").eval(), ROWS[0])
    policy = adapted("none").eval()
    inner = policy.get_base_model()  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    counter = CompileCounterWithBackend("aot_eager")
    run_blocks(inner, recompute="none", compiled=True, backend=counter)
    ours = gradients(policy, ROWS[0])
    assert counter.frame_count > 0
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked", "recompute", "device", "steps", "expected"),
    [
        (None, "none", "cuda", 100, True),
        (None, "all", "cuda", 100, True),
        (None, "none", "cuda", 99, False),
        (None, "none", "cpu", 1000, False),
        (None, "selective", "cuda", 100, False),  # the compiler would choose what is kept
        (True, "none", "cpu", 1, True),
        (False, "none", "cuda", 1000, False),
    ],
)
def test_when_blocks_are_compiled(
    asked: bool | None, recompute: Recompute, device: str, steps: int, expected: bool
) -> None:
    config = DPOConfig(
        model="m", data=("d",), out=Path("o"), beta=0.1, compile_blocks=asked, checkpoint_activations=recompute
    )
    assert compiles(config, torch.device(device), steps) is expected


def test_a_model_without_blocks_is_named() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=0, hidden_size=32, vocab_size=9))
    with pytest.raises(ModelError, match="no transformer blocks"):
        run_blocks(model, recompute="all", compiled=False)
    run_blocks(model, recompute="none", compiled=False)
