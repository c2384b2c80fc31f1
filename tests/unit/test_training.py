"""Reference cache, exact KL, one step, the policy, the schedule: small, exact, on real code."""

import math
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.config import DPOConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, pack
from prefopt.data.store import GroupStore
from prefopt.errors import DataError, MemoryFullError, NonFiniteError
from prefopt.losses import LossTotal, dpo, negative_log_likelihood
from prefopt.model.kl import ReferenceStates, sequence_kl_sum
from prefopt.model.logprobs import sequence_logprob_sum
from prefopt.model.policy import make_policy
from prefopt.model.reference import ReferenceCache, reference_logprobs
from prefopt.train.optimizer import Masters, learning_rate, make_optimizer
from prefopt.train.step import StepResult, train_step
from tiny import completion, group, model_of, random_groups

GROUPS = random_groups([(4, 3, 5), (2, 6, 1), (7, 2, 2)])
CPU = torch.device("cpu")


def test_cached_equals_live_and_is_found_again(tmp_path: Path) -> None:
    model = model_of("Llama")
    calls = []

    def score(batch: PackedBatch) -> torch.Tensor:
        calls.append(batch.sequences)
        return sequence_logprob_sum(model, batch, "shared")

    cache = ReferenceCache(tmp_path, "weights float32")
    first = reference_logprobs(GROUPS, cache, score, tokens_per_batch=lambda: 12, device=CPU)
    assert sum(calls) == 6
    again = reference_logprobs(list(reversed(GROUPS)), cache, score, tokens_per_batch=lambda: 100, device=CPU)
    assert torch.equal(first, again.flip(0)) and sum(calls) == 6, "one pass serves every later one"
    with torch.no_grad():
        live = sequence_logprob_sum(model, pack(GROUPS), "shared")
    keys = [g.sequence_key(k) for g in GROUPS for k in (0, 1)]
    torch.testing.assert_close(first.flatten(), live, atol=1e-5, rtol=1e-6)
    other = ReferenceCache(tmp_path, "other weights float32")
    assert other.get(keys) == {}


def test_a_killed_reference_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = model_of("Llama")
    seen: list[int] = []

    def failing(batch: PackedBatch) -> torch.Tensor:
        if seen:
            raise KeyboardInterrupt
        seen.append(batch.sequences)
        return sequence_logprob_sum(model, batch, "shared")

    def rest(batch: PackedBatch) -> torch.Tensor:
        seen.append(batch.sequences)
        return sequence_logprob_sum(model, batch, "shared")

    cache = ReferenceCache(tmp_path, "w")
    with pytest.raises(KeyboardInterrupt):
        reference_logprobs(GROUPS, cache, failing, tokens_per_batch=lambda: 12, device=CPU)
    reference_logprobs(GROUPS, cache, rest, tokens_per_batch=lambda: 12, device=CPU)
    assert sum(seen) == 6, "a sequence was scored twice or not at all"


def test_each_sequence_is_scored_once_and_those_of_a_prompt_together(tmp_path: Path) -> None:
    """Three pairs made of three completions of one prompt, and a pair that stands twice."""
    a, b, c, other = completion(5, 6), completion(7, 8, 9), completion(4), completion(6, 6)
    pairs = [
        group([1, 2, 3], a, b),
        group([8], a, other),
        group([1, 2, 3], a, c),
        group([1, 2, 3], c, b),
        group([8], a, other),
    ]
    model, slots = model_of("Llama"), list[int]()

    def score(batch: PackedBatch) -> torch.Tensor:
        slots.append(len(batch.input_ids))
        return sequence_logprob_sum(model, batch, "shared")

    store = GroupStore.write(pairs)
    found = reference_logprobs(store, ReferenceCache(tmp_path, "w"), score, tokens_per_batch=lambda: 100, device=CPU)
    # 3 + 2 + 3 + 1 tokens of the first prompt, 1 + 2 + 2 of the second; the five pairs have 8 + 5 + 6 + 7 + 5.
    assert slots == [14]
    with torch.no_grad():
        live = torch.stack([sequence_logprob_sum(model, pack([pair]), "shared") for pair in pairs])
    torch.testing.assert_close(found, live, atol=1e-5, rtol=1e-6)
    small = reference_logprobs(store, ReferenceCache(tmp_path, "v"), score, tokens_per_batch=lambda: 8, device=CPU)
    assert max(slots[1:]) <= 8 and sum(slots[1:]) == 8 + 4 + 5  # the third completion brings its prompt again
    torch.testing.assert_close(small, found, atol=1e-5, rtol=1e-6)


def test_groups_of_several_sizes_share_a_table(tmp_path: Path) -> None:
    groups = random_groups([(3, 2), (2, 4, 1, 3), (5, 2, 2)])
    model = model_of("Llama")
    cache = ReferenceCache(tmp_path, "w")
    table = reference_logprobs(
        groups,
        cache,
        lambda batch: sequence_logprob_sum(model, batch, "shared"),
        tokens_per_batch=lambda: 64,
        device=CPU,
    )
    assert table.isnan().tolist() == [[False, True, True], [False] * 3, [False, False, True]]
    assert table.dtype == torch.float32


def test_what_is_not_finite_is_named_by_its_row(tmp_path: Path) -> None:
    def score(batch: PackedBatch) -> torch.Tensor:
        sums = torch.zeros(batch.sequences)
        sums[-1] = math.nan
        return sums

    shortest = min(GROUPS, key=lambda g: g.tokens)  # batches go from long to short
    with pytest.raises(DataError, match="no finite") as caught:
        reference_logprobs(GROUPS, ReferenceCache(tmp_path, "w"), score, tokens_per_batch=lambda: 100, device=CPU)
    assert caught.value.where == str(shortest.source)
    assert ReferenceCache(tmp_path, "w").get([g.sequence_key(0) for g in GROUPS]) == {}


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "reference.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(DataError, match=r"reference\.sqlite"):
        ReferenceCache(tmp_path, "w")


def test_the_cache_holds_sums_and_counts(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "w")
    cache.put({b"a": (-1.25, 3)})
    with sqlite3.connect(tmp_path / "reference.sqlite") as db:
        assert db.execute("SELECT model, logprob_sum, tokens FROM logprobs").fetchall() == [("w", -1.25, 3)]
    db.close()


def test_kl_equals_the_sum_over_the_vocabulary() -> None:
    policy, reference = model_of("Llama", seed=1), model_of("Llama", seed=2)
    batch = pack(GROUPS)
    ours = sequence_kl_sum(policy, ReferenceStates.of(reference, [batch], "shared"), [batch], "shared")
    expected = []
    policy.set_attn_implementation("sdpa")
    reference.set_attn_implementation("sdpa")
    with torch.no_grad():
        for g in GROUPS:
            for c in g.completions:
                ids = torch.tensor([[*g.prompt_ids.tolist(), *c.ids.tolist()]])
                p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (policy, reference))
                at = slice(len(g.prompt_ids) - 1, ids.shape[1] - 1)
                expected.append((p[at].exp() * (p[at] - q[at])).sum())
    torch.testing.assert_close(ours.double(), torch.stack(expected), atol=1e-4, rtol=1e-5)
    itself = sequence_kl_sum(policy, ReferenceStates.of(policy, [batch], "shared"), [batch], "shared")
    assert itself.abs().max() == 0


def step(model: torch.nn.Module, poison: int | None = None) -> None:
    masters = Masters(model.parameters())
    optimizer = make_optimizer("adamw", masters.parameters, lr=1e-2, weight_decay=0.0)

    def loss_of(batch: PackedBatch) -> LossTotal:
        sums = sequence_logprob_sum(model, batch, "shared")
        if poison is not None:
            owner = torch.tensor([g.source.row for g in batch.groups for _ in g.completions])
            sums = torch.where(owner == poison, sums * float("nan"), sums)
        return negative_log_likelihood(logprob_sum=sums, token_counts=batch.token_counts)

    def tokens(group: CompletionGroup) -> int:
        return sum(c.scored_tokens for c in group.completions)

    train_step(
        random_groups([(4, 3), (2, 6), (7, 2)]),
        loss_of,
        tokens,
        optimizer,
        masters,
        tokens_per_batch=12,
        max_grad_norm=1.0,
        device=CPU,
    )


def test_a_non_finite_loss_names_its_rows_and_moves_nothing() -> None:
    model = model_of("Llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFiniteError) as caught:
        step(model, poison=2)
    assert caught.value.where is not None
    assert "tiny.jsonl row 2" in caught.value.where and "row 1" not in caught.value.where
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_bfloat16_weights_keep_float32_masters() -> None:
    model = model_of("Llama").to(torch.bfloat16)  # type: ignore[arg-type]
    weight = torch.nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))
    masters = Masters([weight])
    optimizer = make_optimizer("adamw", masters.parameters, lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.sum().backward()
        assert weight.grad is None, "the low-precision gradient lingers"
        optimizer.step()
        optimizer.zero_grad()
        masters.refresh()
    # 100 steps of 1e-4; half an ulp of bfloat16 at 0.5 is 1e-3, so without masters nothing would have moved.
    assert masters.parameters[0][0].item() == pytest.approx(0.49, abs=1e-4)
    assert weight[0].item() == pytest.approx(0.49, abs=2e-3)
    step(model)


def test_lora_off_is_the_base() -> None:
    base = model_of("Llama")
    batch = pack(GROUPS)
    with torch.no_grad():
        alone = sequence_logprob_sum(base, batch, "shared")
    config = DPOConfig(model="m", data=("d",), out=Path("o"), beta=0.1, lora_rank=2)
    policy = make_policy(base, config)
    with torch.no_grad():
        assert torch.equal(sequence_logprob_sum(policy, batch, "shared"), alone), "an adapter starts as the identity"
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        assert not torch.equal(sequence_logprob_sum(policy, batch, "shared"), alone)
        with policy.disable_adapter():  # type: ignore[operator]
            assert torch.equal(sequence_logprob_sum(policy, batch, "shared"), alone)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
    ],
)
def test_learning_rates_by_hand(schedule: str, expected: list[float]) -> None:
    rates = [
        learning_rate(s, total=6, peak=1.0, warmup=2.0, schedule=schedule)  # type: ignore[arg-type]
        for s in range(6)
    ]
    assert rates == pytest.approx(expected)
    assert learning_rate(0, total=20, peak=1.0, warmup=0.1, schedule="constant") == 0.5


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, or a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in torch.utils._pytree.tree_leaves(args[1:]) if isinstance(t, torch.Tensor)]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2") or (
            name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in masks)
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_number_is_read_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the one transfer at its end. A CPU's tensors are read without a dispatch: methods are counted, too."""
    read: list[str] = []

    def count(name: str, method: Any) -> Callable[..., Any]:
        def counted(self: torch.Tensor, *args: Any) -> Any:
            read.append(name)
            return method(self, *args)

        return counted

    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, count(name, getattr(torch.Tensor, name)))
    with Reads() as reads:
        float(torch.ones(()))
        torch.ones(3)[torch.tensor([True, False, True])]
    assert len(reads.seen) == 2, "the counting itself works"
    step = dpo_step(model_of("Llama"), CPU)
    read.clear()
    with Reads() as reads:
        result = step()
    assert result.grad_norm > 1 and result.loss > 0
    assert reads.seen == [] and read == ["tolist"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_is_waited_for_once_a_step() -> None:
    model = model_of("Llama", hidden_size=64)  # heads of 16, which the kernels take
    step = dpo_step(model.to("cuda"), torch.device("cuda"))  # type: ignore[arg-type]
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


def dpo_step(model: torch.nn.Module, device: torch.device) -> Callable[[], StepResult]:
    """A whole step, as the recipe's, of two micro-batches."""
    masters = Masters(model.parameters())
    optimizer = make_optimizer("adamw", masters.parameters, lr=1e-3, weight_decay=0.0)
    pairs = [g for g in GROUPS if len(g.completions) == 2]

    def loss_of(batch: PackedBatch) -> LossTotal:
        sums = sequence_logprob_sum(model, batch, "shared")
        known = torch.zeros_like(sums)[: len(sums) // 2]
        return dpo(
            policy_chosen=sums[0::2],
            policy_rejected=sums[1::2],
            reference_chosen=known,
            reference_rejected=known,
            beta=0.1,
            weights=batch.weights,
        )

    return lambda: train_step(
        pairs, loss_of, lambda _: 1, optimizer, masters, tokens_per_batch=20, max_grad_norm=1.0, device=device
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_step_that_runs_out_of_memory_is_computed_in_smaller_parts(dtype: torch.dtype, error: Exception) -> None:
    """The failure comes in the backward pass of the second micro-batch, when gradients have been gathered."""
    groups = random_groups([(4, 3, 2), (2, 6, 1), (7, 2, 2), (3, 3, 3)])

    def run(budget: int, room: int) -> tuple[StepResult, list[torch.nn.Parameter], int]:
        model = model_of("Llama").to(dtype)  # type: ignore[arg-type]
        masters = Masters(model.parameters())
        optimizer = make_optimizer("adamw", masters.parameters, lr=1e-2, weight_decay=0.0)
        calls, handles = 0, list[torch.utils.hooks.RemovableHandle]()

        def loss_of(batch: PackedBatch) -> LossTotal:
            nonlocal calls
            calls += 1
            sums = sequence_logprob_sum(model, batch, "shared")
            if len(batch.input_ids) > room and calls > 1:
                handles.append(model.model.embed_tokens.weight.register_hook(full))
            return negative_log_likelihood(logprob_sum=sums, token_counts=batch.token_counts)

        def full(_: torch.Tensor) -> None:
            handles.pop().remove()
            raise error

        result = train_step(
            groups,
            loss_of,
            lambda g: sum(c.scored_tokens for c in g.completions),
            optimizer,
            masters,
            tokens_per_batch=budget,
            max_grad_norm=1.0,
            device=CPU,
        )
        return result, masters.parameters, calls

    result, weights, calls = run(24, room=12)
    expected, without_failure, _ = run(10, room=100)
    assert result.tokens_per_batch == 10 and calls > len(groups)  # half of the largest part, not of the budget
    assert result == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, without_failure, strict=True))


def test_one_row_that_does_not_fit_is_named_and_nothing_moves() -> None:
    model = model_of("Llama")
    masters = Masters(model.parameters())
    before = [p.detach().clone() for p in masters.parameters]
    groups = random_groups([(4, 3), (7, 2)])

    def loss_of(batch: PackedBatch) -> LossTotal:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(MemoryFullError, match="No weight has moved") as caught:
        train_step(
            groups,
            loss_of,
            lambda _: 1,
            make_optimizer("adamw", masters.parameters, lr=1e-2, weight_decay=0.0),
            masters,
            tokens_per_batch=100,
            max_grad_norm=1.0,
            device=CPU,
        )
    assert caught.value.where is not None and str(groups[1].source) in caught.value.where
    assert all(torch.equal(a, b) for a, b in zip(before, masters.parameters, strict=True))
