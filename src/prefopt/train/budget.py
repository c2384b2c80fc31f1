"""`tokens_per_batch: auto`: the largest micro-batch that free memory takes, found before the first step.

Two probes of different size are run through the very code that will run; their peaks give the bytes
a token costs. The budget is a power of two, so that small changes in free memory do not change it,
and it never changes what a step computes: only how many micro-batches it is computed in.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, pack
from prefopt.data.store import token_counts
from prefopt.progress import say
from prefopt.run import RunFolder
from prefopt.train.step import LossOf

__all__ = [
    "LEAST_TOKENS",
    "Budget",
    "find_budget",
    "forward_budget",
    "free_bytes",
    "peak_bytes",
    "training_budget",
    "training_state_bytes",
]

LEAST_TOKENS = 64
# Tokens of the two probes, or the longest row if that is more. On CUDA more than a tile of the head has rows,
# or the tile, which grows no further, would be counted to every token.
_PROBES = {"cpu": (512, 2048), "cuda": (8192, 16_384)}
_SHARE = 0.8  # of the free memory; the rest is for fragments and for what other programs take meanwhile
_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Budget:
    """Tokens in a micro-batch, and what they were derived from: bytes and the tokens of the longest row."""

    tokens: int
    bytes_per_token: float
    free: int
    longest: int

    def __str__(self) -> str:
        text = (
            f"{self.tokens:,} tokens a micro-batch (auto: {self.bytes_per_token / 2**20:.2f} MiB a token, "
            f"{self.free / 2**30:.1f} GiB free)"
        )
        return text if self.longest <= self.tokens else f"{text}; the longest row has {self.longest:,} and stands alone"


def training_budget(
    run: RunFolder,
    asked: int | None,
    policy: torch.nn.Module,
    loss_of: LossOf,
    groups: Sequence[CompletionGroup],
    device: torch.device,
) -> int:
    """Tokens of a training micro-batch: what was asked for, else what the run found when it started, else found now.

    A resumed run keeps the budget it had, or its sums would be rounded in another order.
    """
    if asked is not None:
        return asked
    known = [int(event["tokens"]) for event in run.events() if event["event"] == "budget"]
    if known:
        return known[0]

    def probe(part: Sequence[CompletionGroup]) -> None:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss_of(pack(part).to(device)).losses.sum().backward()
        policy.zero_grad(set_to_none=True)

    budget = find_budget(
        probe,
        _longest(groups),
        device=device,
        free=free_bytes(device),
        reserved=training_state_bytes(list(policy.parameters())),
    )
    say(f"training: {budget}")
    run.event("budget", step=0, tokens=budget.tokens, bytes_per_token=budget.bytes_per_token, free=budget.free)
    return budget.tokens


@torch.no_grad()
def forward_budget(
    asked: int | None,
    score: Callable[[PackedBatch], torch.Tensor],
    groups: Sequence[CompletionGroup],
    device: torch.device,
) -> int:
    """Tokens of a batch that is only scored: what was asked for, else what memory takes."""
    if asked is not None:
        return asked
    budget = find_budget(
        lambda part: score(pack(part).to(device)), _longest(groups), device=device, free=free_bytes(device)
    )
    say(f"scoring: {budget}")
    return budget.tokens


def find_budget(
    probe: Callable[[Sequence[CompletionGroup]], object],
    longest: Sequence[CompletionGroup],
    *,
    device: torch.device,
    free: int,
    reserved: int = 0,
) -> Budget:
    """The largest power of two of tokens whose peak stays within the free memory.

    No more than keeps the device busy: 8,192 on a CPU, 65,536 on CUDA.

    Args:
        probe: Computes what one micro-batch of these groups computes and leaves nothing behind.
        longest: Rows to try it on, longest first, since attention costs them most.
        free: Bytes there are, `free_bytes(device)`.
        reserved: Bytes of them that will be taken besides (optimiser state, gradients).
    """
    try:
        sizes, (small, large) = _probed(probe, longest, device, _PROBES[device.type])
    except torch.OutOfMemoryError:
        sizes = []
    if not sizes:  # here, where the error no longer holds on to tensors
        torch.cuda.empty_cache()
        sizes, (small, large) = _probed(probe, longest, device, _PROBES["cpu"])
    # Where rows are few or long there is one size only: all of its peak is put down to its tokens.
    slope = (large - small) / (sizes[1] - sizes[0]) if sizes[1] > 1.5 * sizes[0] else large / sizes[1]
    slope = max(slope, 1.0)
    fixed = max(0.0, large - slope * sizes[1])
    fitting = (_SHARE * free - reserved - fixed) / slope
    tokens = 65_536 if device.type == "cuda" else 8_192
    while tokens > LEAST_TOKENS and tokens > fitting:
        tokens //= 2
    return Budget(tokens, slope, free, longest[0].tokens)


def _probed(
    probe: Callable[[Sequence[CompletionGroup]], object],
    longest: Sequence[CompletionGroup],
    device: torch.device,
    tokens: tuple[int, int],
) -> tuple[list[int], list[int]]:
    """Tokens and peak bytes of the two probes."""
    parts = [_first_tokens(longest, wanted) for wanted in tokens]
    if device.type == "cuda":
        probe(parts[0])  # what is made once, such as compiled kernels, is not a token's
    return [sum(g.tokens for g in part) for part in parts], [peak_bytes(partial(probe, part), device) for part in parts]


def _longest(groups: Sequence[CompletionGroup]) -> list[CompletionGroup]:
    longest = np.argsort(-token_counts(groups), kind="stable")
    return [groups[int(i)] for i in longest[: _PROBES["cuda"][1]]]  # at least a token each: enough for any probe


def _first_tokens(groups: Sequence[CompletionGroup], tokens: int) -> list[CompletionGroup]:
    taken: list[CompletionGroup] = []
    total = 0
    for group in groups:
        if total >= tokens:
            break
        taken.append(group)
        total += group.tokens
    return taken


def training_state_bytes(parameters: Sequence[torch.nn.Parameter]) -> int:
    """Bytes a step adds to the model: float32 gradients and Adam's moments, and masters of low-precision weights."""
    trained = [p for p in parameters if p.requires_grad]
    masters = sum(p.numel() for p in trained if p.dtype != torch.float32)
    return 4 * ((1 + _ADAM_MOMENTS) * sum(p.numel() for p in trained) + masters)


def free_bytes(device: torch.device) -> int:
    """Memory this process may still take: on the GPU, or of the machine within the container's limit."""
    if device.type == "cuda":
        on_device, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return on_device + unused
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files read once count as used, and are given up when anything else wants the memory.
        free = min(free, int(most) - int(used.read_text()) + int(numbers["inactive_file"]))
    return max(0, free)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most tensor memory that `run` holds at a time, over what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    counted = _LiveStorages()
    with counted:
        run()
    return counted.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of tensors made under it while they live; the CPU's allocator keeps no such books."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _stored(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if _stored(tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


def _stored(value: object) -> bool:
    return isinstance(value, torch.Tensor)
