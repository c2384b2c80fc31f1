"""Micro-batches on their device, the next one on its way while the present one is computed."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, pack

__all__ = ["feed", "scored"]


def feed(parts: Iterable[Sequence[CompletionGroup]], device: torch.device) -> Iterator[PackedBatch]:
    """Pack each part and bring it to `device`, in order.

    On CUDA a batch is packed and copied, from page-locked memory and on a stream of its own, before
    the one ahead of it is handed out: only the first is waited for, as long as nobody reads a
    batch's results before asking for the next (`scored`).
    """
    if device.type != "cuda":
        yield from (pack(part).to(device) for part in parts)
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[PackedBatch, torch.cuda.Event] | None = None
    for part in parts:
        with torch.cuda.stream(copying):
            batch = pack(part).pin_memory().to(device, non_blocking=True)
            copied = copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = batch, copied
    if ahead is not None:
        yield _arrived(*ahead, device)


def scored(
    parts: Iterable[Sequence[CompletionGroup]],
    score: Callable[[PackedBatch], Float[Tensor, " sequences"]],
    device: torch.device,
) -> Iterator[tuple[PackedBatch, Float[Tensor, " sequences"]]]:
    """Each batch and what `score` makes of it, on the CPU, float64.

    On CUDA a batch is under way before the results of the one ahead of it are read.
    """
    ahead: tuple[PackedBatch, Tensor] | None = None
    for batch in feed(parts, device):
        sums = score(batch)
        if device.type != "cuda":
            yield batch, sums.double()
            continue
        if ahead is not None:
            yield ahead[0], ahead[1].double().cpu()
        ahead = batch, sums
    if ahead is not None:
        yield ahead[0], ahead[1].double().cpu()


def _arrived(batch: PackedBatch, copied: torch.cuda.Event, device: torch.device) -> PackedBatch:
    """`batch`, once computing waits for its copy; its memory is not given away while it is computed on."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    batch.record_stream(computing)
    return batch
