"""Completion groups -> one row of tokens without padding, the prompt of each group stored once.

Layout of one group with K completions in the row:

    slots      | prompt ........ | completion 0 .. | completion 1 .. | ...
    positions  | 0 ... P-1       | P ...           | P ...           | ...
    attends to | itself, causal  | prompt + itself | prompt + itself | ...

The prompt with its first completion is one plain causal segment; every further completion is a
segment whose keys are the prompt's and its own. The first token of EVERY completion is predicted
by the prompt's last hidden state.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefopt.data.group import CompletionGroup

__all__ = ["PackedBatch", "Segment", "micro_batches", "pack"]


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


@dataclass(frozen=True)
class PackedBatch:
    """One packed row; sequences are numbered group by group, completion by completion.

    Attributes:
        input_ids: Token of each slot.
        position_ids: Position of each slot in its own sequence.
        segments: Who attends to whom.
        spans: Per sequence the segment-like pair (prompt slots, completion slots).
        predictors: Slot of the hidden state that predicts each target.
        targets: Token ids to score (trainable completion tokens only).
        sequence_of_target: Which sequence each target belongs to.
        token_counts: Scored tokens per sequence.
        groups: The groups packed, in order.
    """

    input_ids: Int[Tensor, " slots"]
    position_ids: Int[Tensor, " slots"]
    segments: tuple[Segment, ...]
    spans: tuple[tuple[range, range], ...]
    predictors: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    sequence_of_target: Int[Tensor, " targets"]
    token_counts: Int[Tensor, " sequences"]
    groups: tuple[CompletionGroup, ...]

    @property
    def sequences(self) -> int:
        """Number of sequences: the sum of K over the groups."""
        return len(self.spans)

    @property
    def weights(self) -> Float[Tensor, " groups"]:
        """Loss weight of each group."""
        return torch.tensor([g.weight for g in self.groups], dtype=torch.float32, device=self.input_ids.device)

    @property
    def truncated(self) -> Float[Tensor, " groups"]:
        """1 for each group with a cut completion, else 0."""
        return torch.tensor([float(g.truncated) for g in self.groups], device=self.input_ids.device)

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            sequence_of_target=self.sequence_of_target.to(device),
            token_counts=self.token_counts.to(device),
        )


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
        segments=tuple(segments),
        spans=tuple(spans),
        predictors=_tensor(predictors),
        targets=_tensor(targets),
        sequence_of_target=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        token_counts=torch.from_numpy(counts),
        groups=tuple(groups),
    )


def _tensor(parts: Iterable[np.ndarray]) -> Int[Tensor, " n"]:
    return torch.from_numpy(np.concatenate([np.asarray(p, dtype=np.int64) for p in parts]))


def micro_batches(groups: Sequence[CompletionGroup], tokens_per_batch: int) -> list[list[CompletionGroup]]:
    """Split one step's groups into micro-batches of at most `tokens_per_batch` tokens each.

    First fit, longest group first (within 11/9 of the fewest possible bins). A group longer than
    the budget stands alone: the budget bounds memory, it never drops a row. What a step computes
    does not depend on the split: losses are summed and divided once.
    """
    bins: list[list[CompletionGroup]] = []
    room: list[int] = []
    for group in sorted(groups, key=lambda g: -g.tokens):
        for b, free in enumerate(room):
            if group.tokens <= free:
                bins[b].append(group)
                room[b] -= group.tokens
                break
        else:
            bins.append([group])
            room.append(tokens_per_batch - group.tokens)
    return bins
