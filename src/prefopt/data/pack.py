"""Completion groups -> one row of tokens without padding, the prompt of each group stored once.

Layout of one group with K completions in the row:

    slots      | prompt ........ | completion 0 .. | completion 1 .. | ...
    positions  | 0 ... P-1       | P ...           | P ...           | ...
    attends to | itself, causal  | prompt + itself | prompt + itself | ...

The prompt with its first completion is one plain causal segment; every further completion is a
segment whose keys are the prompt's and its own. The first token of EVERY completion is predicted
by the prompt's last hidden state.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.data.group import CompletionGroup

__all__ = ["PackedBatch", "Segment", "SegmentLayout", "pack"]

_NOWHERE = torch.iinfo(torch.int64).min


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries at slots [start, stop); keys at slots [prefix_start, prefix_stop), then the queries' own.

    Attention is causal from the bottom right: query i sees the whole prefix and own slots <= i.
    """

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int

    @property
    def prefix(self) -> int:
        """Number of prefix keys."""
        return self.prefix_stop - self.prefix_start


@dataclass(eq=False)  # not frozen: torch 2.11 would compile a block again for every row whose fields differ
class SegmentLayout:
    """Who attends to whom, in every form an attention kernel takes it.

    Attributes:
        segments: In the order of their slots, which they cover without a gap.
        cu_seq_q: Queries before each segment, and all of them (int32): variable-length kernels.
        cu_seq_k: Likewise keys; a segment's keys are its prefix, then its own slots.
        max_q: Most queries of a segment.
        max_k: Most keys of a segment.
        key_slots: Slot of each of these keys; None if that is every slot once, in order.
        own_start: Per slot (int32) the first slot of its segment: mask functions.
        prefix_start: Per slot the first slot of its segment's prefix.
        prefix_stop: Per slot the end of its segment's prefix.
        made: What a kernel has made of the layout, by a key of its own; every layer uses it again.
    """

    segments: tuple[Segment, ...]
    cu_seq_q: Int[Tensor, " segments_and_one"]
    cu_seq_k: Int[Tensor, " segments_and_one"]
    max_q: int
    max_k: int
    key_slots: Int[Tensor, " keys"] | None
    own_start: Int[Tensor, " slots"]
    prefix_start: Int[Tensor, " slots"]
    prefix_stop: Int[Tensor, " slots"]
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "SegmentLayout":
        """The layout of `segments`, on the CPU."""
        starts, stops, prefix_starts, prefix_stops = np.array(
            [(s.start, s.stop, s.prefix_start, s.prefix_stop) for s in segments]
        ).T
        queries = stops - starts
        keys = queries + prefix_stops - prefix_starts
        slots = [np.r_[s.prefix_start : s.prefix_stop, s.start : s.stop] for s in segments]
        return cls(
            segments=tuple(segments),
            cu_seq_q=_int32(np.r_[0, queries.cumsum()]),
            cu_seq_k=_int32(np.r_[0, keys.cumsum()]),
            max_q=int(queries.max()),
            max_k=int(keys.max()),
            key_slots=_tensor(slots) if (keys > queries).any() else None,
            own_start=_int32(np.repeat(starts, queries)),
            prefix_start=_int32(np.repeat(prefix_starts, queries)),
            prefix_stop=_int32(np.repeat(prefix_stops, queries)),
        )


@dataclass(frozen=True)
class PackedBatch:
    """One packed row; sequences are numbered group by group, completion by completion.

    Attributes:
        input_ids: Token of each slot.
        position_ids: Position of each slot in its own sequence.
        layout: Who attends to whom.
        spans: Per sequence the segment-like pair (prompt slots, completion slots).
        predictors: Slot of the hidden state that predicts each target.
        targets: Token ids to score (trainable completion tokens only).
        sequence_of_target: Which sequence each target belongs to.
        token_counts: Scored tokens per sequence.
        places: `group.place` of each group; an index that no table has where it stands in none.
        weights: Loss weight of each group.
        labels: `group.label` of each group.
        margins: `group.margin` of each group.
        truncated: 1 for each group with a cut completion, else 0.
        groups: The groups packed, in order.
    """

    input_ids: Int[Tensor, " slots"]
    position_ids: Int[Tensor, " slots"]
    layout: SegmentLayout
    spans: tuple[tuple[range, range], ...]
    predictors: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    sequence_of_target: Int[Tensor, " targets"]
    token_counts: Int[Tensor, " sequences"]
    places: Int[Tensor, " groups"]
    weights: Float[Tensor, " groups"]
    labels: Float[Tensor, " groups"]
    margins: Float[Tensor, " groups"]
    truncated: Float[Tensor, " groups"]
    groups: tuple[CompletionGroup, ...]

    @property
    def sequences(self) -> int:
        """Number of sequences: the sum of K over the groups."""
        return len(self.spans)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch with its tensors on `device`; from pinned memory the copy need not be waited for."""
        return _moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return _moved(self, lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of tensors made on another stream until `stream` is done with them."""

        def recorded(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        _moved(self, recorded)


Moved = TypeVar("Moved", PackedBatch, SegmentLayout)


def _moved(whole: Moved, move: Callable[[Tensor], Tensor]) -> Moved:
    changes: dict[str, Any] = {}
    for part in fields(whole):
        value = getattr(whole, part.name)
        if isinstance(value, Tensor):
            changes[part.name] = move(value)
        elif isinstance(value, SegmentLayout):
            changes[part.name] = _moved(value, move)
    return replace(whole, **changes)


def pack(groups: Sequence[CompletionGroup]) -> PackedBatch:
    """Lay `groups` out in one row."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    spans: list[tuple[range, range]] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    slot = 0
    for group in groups:
        prompt = range(slot, slot + len(group.prompt_ids))
        ids.append(group.prompt_ids)
        positions.append(np.arange(len(prompt)))
        slot = prompt.stop
        for k, completion in enumerate(group.completions):
            own = range(slot, slot + len(completion.ids))
            slot = own.stop
            ids.append(completion.ids)
            positions.append(np.arange(len(prompt), len(prompt) + len(own)))
            if k == 0:
                segments.append(Segment(prompt.start, own.stop, prompt.start, prompt.start))
            else:
                segments.append(Segment(own.start, own.stop, prompt.start, prompt.stop))
            before = np.arange(own.start - 1, own.stop - 1)
            before[:1] = prompt.stop - 1
            predictors.append(before[completion.trainable])
            targets.append(completion.ids[completion.trainable])
            spans.append((prompt, own))
    counts = np.array([len(t) for t in targets])
    return PackedBatch(
        input_ids=_tensor(ids),
        position_ids=_tensor(positions),
        layout=SegmentLayout.of(segments),
        spans=tuple(spans),
        predictors=_tensor(predictors),
        targets=_tensor(targets),
        sequence_of_target=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        token_counts=torch.from_numpy(counts),
        places=torch.tensor([_NOWHERE if g.place is None else g.place for g in groups]),
        weights=torch.tensor([g.weight for g in groups], dtype=torch.float32),
        labels=torch.tensor([g.label for g in groups], dtype=torch.float32),
        margins=torch.tensor([g.margin for g in groups], dtype=torch.float32),
        truncated=torch.tensor([float(g.truncated) for g in groups]),
        groups=tuple(groups),
    )


def _tensor(parts: Iterable[np.ndarray]) -> Int[Tensor, " n"]:
    return torch.from_numpy(np.concatenate([np.asarray(p, dtype=np.int64) for p in parts]))


def _int32(values: np.ndarray) -> Int[Tensor, " n"]:
    return torch.from_numpy(values.astype(np.int32))
