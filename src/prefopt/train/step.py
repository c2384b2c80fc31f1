"""One optimiser step: micro-batches in, one global division, one check, one update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.bins import batches_by_length, micro_batches
from prefopt.data.feed import feed
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.errors import MemoryFullError, NonFiniteError
from prefopt.losses.total import LossTotal
from prefopt.records import Source
from prefopt.train.checkpoint import restore_rng, rng_tensors
from prefopt.train.optimizer import Masters, gradient_norm

__all__ = ["LossOf", "StepResult", "Update", "evaluate_loss", "one_step", "train_step"]

LossOf = Callable[[PackedBatch], LossTotal]


@dataclass(frozen=True)
class StepResult:
    """Means over the step's global count; `metrics` are means over its groups.

    Attributes:
        tokens: Of all micro-batches.
        tokens_per_batch: The budget that memory took: the one given, or a smaller one.
    """

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    tokens: int
    tokens_per_batch: int


# Rows of a step, optimiser, masters and the budget of a micro-batch.
Update = Callable[[Sequence[CompletionGroup], torch.optim.Optimizer, Masters, int], StepResult]


def one_step(
    loss_of: LossOf, count_of: Callable[[CompletionGroup], int], *, max_grad_norm: float, device: torch.device
) -> Update:
    """`train_step` with a fixed loss, as the loop calls it."""

    def update(
        groups: Sequence[CompletionGroup], optimizer: torch.optim.Optimizer, masters: Masters, tokens_per_batch: int
    ) -> StepResult:
        return train_step(
            groups,
            loss_of,
            count_of,
            optimizer,
            masters,
            tokens_per_batch=tokens_per_batch,
            max_grad_norm=max_grad_norm,
            device=device,
        )

    return update


def train_step(
    groups: Sequence[CompletionGroup],
    loss_of: LossOf,
    count_of: Callable[[CompletionGroup], int],
    optimizer: torch.optim.Optimizer,
    masters: Masters,
    *,
    tokens_per_batch: int,
    max_grad_norm: float,
    device: torch.device,
) -> StepResult:
    """Accumulate sum(losses) / global count over micro-batches, check, clip, update.

    The global count is known before the first forward pass, so a gradient is the same whatever the
    micro-batches are. The device is asked for numbers once, at the end. Where memory runs out the step
    begins again with half the budget.

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite; the rows are named and no parameter has moved.
        MemoryFullError: there is too little memory for one row at a time; no parameter has moved.
    """
    count = sum(count_of(g) for g in groups)
    tally, random = None, rng_tensors()
    while tally is None:
        masters.forget_gradients()
        parts = micro_batches(groups, tokens_per_batch)
        tally = _accumulate(parts, loss_of, count, device)
        if tally is None:
            masters.forget_gradients()
            restore_rng(random)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if len(parts) == len(groups):
                raise _memory_full(groups)
            tokens_per_batch = min(tokens_per_batch, max(sum(g.tokens for g in part) for part in parts)) // 2
    norm = gradient_norm(masters.parameters)
    torch.nn.utils.clip_grads_with_norm_(masters.parameters, max_grad_norm, norm)
    grad_norm, summary = tally.read(norm)
    result = StepResult(summary.loss_sum / count, grad_norm, summary.means, tally.tokens, tokens_per_batch)
    if not (math.isfinite(grad_norm) and summary.finite):
        masters.forget_gradients()
        raise _non_finite(tally, result, groups)
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:  # its state is made before the first weight moves
        if not _out_of_memory(error):
            raise
        raise _memory_full(groups) from error
    masters.refresh()
    return result


def _accumulate(
    parts: Sequence[Sequence[CompletionGroup]], loss_of: LossOf, count: int, device: torch.device
) -> "_Tally | None":
    """The gradient of sum(losses) / count over `parts`; None where memory ran out."""
    tally = _Tally()
    try:
        for batch in feed(parts, device):
            total = loss_of(batch)
            (total.losses.sum() / count).backward()
            tally.add(batch, total)
        return tally
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
    return None  # from here, so that neither this frame nor the error's hold on to the step's tensors


def _out_of_memory(error: Exception) -> bool:
    """A CPU's allocator and CUDA's libraries say so in words alone."""
    words = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@torch.no_grad()
def evaluate_loss(
    groups: Sequence[CompletionGroup],
    loss_of: LossOf,
    count_of: Callable[[CompletionGroup], int],
    *,
    tokens_per_batch: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """`loss` and the mean metrics over `groups`, computed as a training step would."""
    tally, count = _Tally(), 0
    for batch in feed(batches_by_length(groups, tokens_per_batch), device):
        tally.add(batch, loss_of(batch))
        count += sum(count_of(g) for g in batch.groups)
        advance(len(batch.groups))
    _, summary = tally.read(torch.zeros((), device=device))
    return {"loss": summary.loss_sum / count, **summary.means}


@dataclass(frozen=True)
class _Summary:
    loss_sum: float
    finite: bool
    means: dict[str, float]


class _Tally:
    """Sums over micro-batches, kept on the device until they are read, all at once."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.losses: list[Tensor] = []
        self.metrics: dict[str, list[Tensor]] = {}
        self.tokens = 0

    def add(self, batch: PackedBatch, total: LossTotal) -> None:
        self.sources += [g.source for g in batch.groups]
        self.losses.append(total.losses.detach())
        for name, values in total.metrics.items():
            self.metrics.setdefault(name, []).append(values)
        self.tokens += len(batch.input_ids)

    def read(self, also: Float[Tensor, ""]) -> tuple[float, _Summary]:
        """`also`, and everything tallied, in the one transfer of a step: the device is waited for here only."""
        losses = torch.cat(self.losses).double()
        means = [torch.cat(parts).double().mean() for parts in self.metrics.values()]
        numbers = torch.stack([also.double(), losses.sum(), losses.isfinite().all().double(), *means]).tolist()
        return numbers[0], _Summary(numbers[1], bool(numbers[2]), dict(zip(self.metrics, numbers[3:], strict=True)))

    def bad_rows(self) -> list[str]:
        finite = torch.isfinite(torch.cat(self.losses)).tolist()
        return [str(source) for source, ok in zip(self.sources, finite, strict=True) if not ok]


def _memory_full(groups: Sequence[CompletionGroup]) -> MemoryFullError:
    longest = max(groups, key=lambda g: g.tokens)
    return MemoryFullError(
        "There is not enough memory for a training step, one row at a time.",
        where=f"one of the step's rows, the longest of them {longest.source}",
        got=f"up to {longest.tokens:,} tokens a row",
        todo="No weight has moved. Lower --max-length, or add --checkpoint-activations all, --lora-rank or "
        "--dtype bfloat16.",
    )


def _non_finite(tally: _Tally, result: StepResult, groups: Sequence[CompletionGroup]) -> NonFiniteError:
    bad = tally.bad_rows()
    rows = bad or [str(g.source) for g in groups]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return NonFiniteError(
        "The loss is not finite." if bad else "The gradient is not finite, though every row's loss is.",
        where=("rows " if bad else "one of the step's rows: ") + shown,
        got=f"loss {result.loss}, gradient norm {result.grad_norm}",
        expected="finite numbers",
        todo="No weight has moved. Look at these rows, lower --lr, or use --dtype float32; then `prefopt resume`.",
    )
