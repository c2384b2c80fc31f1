"""How much of [tokens, vocab] the head holds at once: tiles of tokens, each over the WHOLE vocabulary.

Values never depend on these sizes, but for the rounding of sums. They follow from the memory the
machine HAS, not from what is free at the moment, so that a run that is resumed rounds as before.
"""

import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

__all__ = ["block_rows", "borrow", "give_back", "kept_rows", "slices", "tile_rows"]

# Float32 elements of a tile. CPU: 32 MiB, the most that glibc hands out again without new pages, and
# 256 rows of 32,000 (64 rows and 1,024 rows are slower, in float32 and bfloat16). CUDA: 1 GiB.
_TILE_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
_ROWS = (64, 4096)  # fewer and the products starve, whatever the vocabulary; more gains nothing
# Elements of a tile that one CPU core works through at a time. 1 << 17 lie in its second-level cache and are
# a tenth faster in bfloat16; but the cores wait for one another after every operation on a block, and where
# other programs want them, too, each wait costs a slice of time (measured: 2.7 times as long a forward pass).
_BLOCK_ELEMENTS = 1 << 20
# Share of the device's memory that may keep tiles for the backward pass, and the most on a CPU,
# where a container may have less memory than the machine says.
_KEPT_SHARE, _KEPT_BYTES_CPU = 16, 1 << 30


@cache
def _memory(device: torch.device) -> int:
    """Bytes the device has, read once."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def tile_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens in one tile."""
    elements = _TILE_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
    elements = min(elements, _memory(device) // 64 // 4)
    low, high = _ROWS
    return max(low, min(high, elements // vocabulary))


def kept_rows(tokens: int, vocabulary: int, like: Tensor) -> int:
    """How many of `tokens` rows may be kept for the backward pass: whole tiles, within the memory set aside."""
    device = like.device
    budget = _memory(device) // _KEPT_SHARE
    if device.type != "cuda":
        budget = min(budget, _KEPT_BYTES_CPU)
    rows = budget // (vocabulary * like.dtype.itemsize)
    if rows >= tokens:
        return tokens
    tile = tile_rows(vocabulary, device)
    return rows // tile * tile


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of a tile that element-wise work takes at a time: on a CPU what its caches hold, else all."""
    if device.type == "cuda":
        return tile_rows(vocabulary, device)
    threads = torch.get_num_threads()
    return threads * max(1, _BLOCK_ELEMENTS * 2 // vocabulary)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """[start, stop) in pieces of `step`, the last one shorter."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


_spare: list[Tensor] = []


def borrow(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised [rows, columns] tensor; on a CPU in the memory given back last, if that is enough.

    Asking the system for half a gigabyte of new pages costs as long as the matrix product that
    keeping tiles saves. CUDA's allocator keeps its pages itself.
    """
    size = rows * columns
    if like.device.type == "cpu" and _spare:
        flat = _spare.pop()
        if flat.dtype == like.dtype and flat.numel() >= size:
            return flat[:size].view(rows, columns)
    return torch.empty(size, dtype=like.dtype, device=like.device).view(rows, columns)


def give_back(kept: Tensor) -> None:
    """Nobody reads `kept` any more."""
    if kept.device.type == "cpu":
        base = kept._base if kept._base is not None else kept
        _spare[:] = [base.view(-1)]
