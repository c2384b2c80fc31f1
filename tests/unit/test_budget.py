"""`tokens_per_batch: auto`: what is counted, and what is made of it."""

from collections.abc import Sequence

import pytest
import torch

from prefopt.data.group import CompletionGroup
from prefopt.data.pack import pack
from prefopt.model.logprobs import sequence_logprob_sum
from prefopt.train.budget import LEAST_TOKENS, find_budget, free_bytes, peak_bytes, training_state_bytes
from tiny import model_of, random_groups

CPU = torch.device("cpu")


def by_length(lengths: Sequence[tuple[int, ...]]) -> list[CompletionGroup]:
    return sorted(random_groups(lengths), key=lambda g: -g.tokens)


def test_the_peak_is_what_lives_at_a_time() -> None:
    def run() -> None:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000 live
        del a
        c = torch.cat([b, b])  # 4,000 + 8,000 live: the peak
        del b
        c.view(2, 1000).add_(1)  # a view and an in-place sum take nothing

    assert peak_bytes(run, CPU) == 12_000


def test_tensors_from_before_are_not_counted() -> None:
    before = torch.zeros(1000)
    assert peak_bytes(lambda: before.mul_(2), CPU) == 0


def test_the_backward_pass_is_counted() -> None:
    weight = torch.ones(100, 100, requires_grad=True)

    def run() -> None:
        (weight * weight).sum().backward()

    # The gradient (40,000) and what autograd needs on the way to it.
    assert peak_bytes(run, CPU) >= 80_000


def test_the_budget_is_the_power_of_two_that_fits() -> None:
    def probe(groups: Sequence[CompletionGroup]) -> None:
        torch.zeros(25 * sum(g.tokens for g in groups) + 5000)  # 100 bytes a token and 20,000 for itself

    rows = by_length([(60, 20, 20)] * 40)
    budget = find_budget(probe, rows, device=CPU, free=1_000_000, reserved=80_000)
    assert budget.bytes_per_token == pytest.approx(100)
    # 0.8 * 1,000,000 - 80,000 - 20,000 = 700,000 bytes = 7,000 tokens
    assert budget.tokens == 4096
    assert "8,192" not in str(budget) and "4,096 tokens" in str(budget)
    assert find_budget(probe, rows, device=CPU, free=10**9).tokens == 8192, "more would not be faster"
    assert find_budget(probe, rows, device=CPU, free=0).tokens == LEAST_TOKENS


def test_few_or_long_rows_are_enough() -> None:
    def probe(groups: Sequence[CompletionGroup]) -> None:
        torch.zeros(25 * sum(g.tokens for g in groups))

    budget = find_budget(probe, by_length([(30, 10, 10)]), device=CPU, free=500_000)
    assert budget.tokens == 2048  # 400,000 bytes = 4,000 tokens
    budget = find_budget(probe, by_length([(2000, 100, 100)]), device=CPU, free=200_000)
    assert budget.tokens == 1024  # 160,000 bytes = 1,600 tokens
    assert "2,200" in str(budget), "a row that is longer is named"


def test_a_token_costs_the_same_however_many_there_are() -> None:
    model = model_of("Llama")

    def peak(rows: int) -> int:
        batch = pack(random_groups([(40, 20, 20)] * rows))

        def run() -> None:
            sequence_logprob_sum(model, batch, "shared").sum().backward()
            model.zero_grad()

        return peak_bytes(run, CPU)

    assert peak(8) - peak(4) == pytest.approx((peak(16) - peak(8)) / 2, rel=0.05)


def test_training_state() -> None:
    full = torch.nn.Parameter(torch.zeros(10))
    low = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    frozen = torch.nn.Parameter(torch.zeros(1000), requires_grad=False)
    # Gradient and two moments of 20 weights, a master of 10, 4 bytes each.
    assert training_state_bytes([full, low, frozen]) == 4 * (3 * 20 + 10)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50
