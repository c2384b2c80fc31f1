"""The layout of a packed row, spelled out slot by slot, and how steps are split and ordered."""

import hashlib

import numpy as np
import pytest
import torch

from prefopt.data.feed import feed
from prefopt.data.order import rows_of_step, split_by_prompt, steps_per_epoch
from prefopt.data.pack import Segment, pack
from tiny import completion, group, random_groups


def test_layout_of_two_groups_slot_by_slot() -> None:
    batch = pack(
        [
            group([10, 11], completion(1, 2, 3), completion(4, 5)),
            group([20], completion(6, 7, 8, trainable=[True, False, True])),
        ]
    )
    # slots                            0   1   2  3  4  5  6  7   8  9  10
    assert batch.input_ids.tolist() == [10, 11, 1, 2, 3, 4, 5, 20, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3]
    assert batch.layout.segments == (Segment(0, 5, 0, 0), Segment(5, 7, 0, 2), Segment(7, 11, 7, 7))
    # The first token of every completion is predicted by the prompt's last slot: 1, 1 and 7.
    assert batch.predictors.tolist() == [1, 2, 3, 1, 5, 7, 9]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert batch.sequence_of_target.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert batch.token_counts.tolist() == [3, 2, 2]


def test_what_the_kernels_get_segment_by_segment_and_slot_by_slot() -> None:
    first, second = group([10, 11], completion(1, 2, 3), completion(4, 5)), group([20], completion(6, 7, 8))
    layout = pack([first, second]).layout
    # Queries: prompt and first completion 0-4, second completion 5-6, second group 7-10.
    assert layout.cu_seq_q.tolist() == [0, 5, 7, 11]
    # Keys: the second completion's are the prompt's two again, then its own.
    assert layout.cu_seq_k.tolist() == [0, 5, 9, 13]
    assert layout.key_slots is not None
    assert layout.key_slots.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10]
    assert (layout.max_q, layout.max_k) == (5, 5)
    assert layout.own_start.tolist() == [0] * 5 + [5] * 2 + [7] * 4
    assert layout.prefix_start.tolist() == [0] * 7 + [7] * 4
    assert layout.prefix_stop.tolist() == [0] * 5 + [2] * 2 + [7] * 4
    assert layout.cu_seq_q.dtype == layout.cu_seq_k.dtype == torch.int32
    assert pack([second]).layout.key_slots is None, "every slot once, in order: nothing to gather"


def test_the_whole_batch_moves() -> None:
    batch = pack(random_groups([(5, 4, 3), (2, 6)])).to(torch.device("meta"), non_blocking=True)
    tensors = [v for part in (batch, batch.layout) for v in vars(part).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 11 + 6
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (8, 4), (3, 5)])
def test_every_row_once_an_epoch_in_an_order_of_its_own(rows: int, batch: int) -> None:
    steps = steps_per_epoch(rows, batch)
    epochs = [
        [i for s in range(e * steps, (e + 1) * steps) for i in rows_of_step(s, rows=rows, batch=batch, seed=7)]
        for e in range(4)
    ]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    order = np.random.default_rng([7, 1]).permutation(rows)
    assert rows_of_step(steps, rows=rows, batch=batch, seed=7) == order[:batch].tolist()


def test_no_prompt_on_both_sides_of_the_split() -> None:
    groups = [group([p, 1], completion(p, r), row=10 * p + r) for p in range(1, 21) for r in range(1, 4)]
    split = split_by_prompt(groups, 0.25, seed=3)
    sides = [{groups[i].prompt_ids.tobytes() for i in side} for side in (split.train, split.held_out)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [15, 5]
    assert sorted([*split.train, *split.held_out]) == list(range(len(groups)))
    assert list(split.train) == sorted(split.train)
    assert list(split_by_prompt(groups, 0.25, seed=4).held_out) != list(split.held_out)


def test_the_split_is_by_rank_of_the_seeded_hash() -> None:
    """Written out plainly, so that a run resumed by a later version holds out the same rows."""
    groups = [group([p, p + 1], completion(7), row=p) for p in (5, 6, 5, 8, 9)]
    ranks = [hashlib.blake2b(g.prompt_ids.tobytes(), key=b"11", digest_size=16).digest() for g in groups]
    held = set(sorted(set(ranks))[:2])
    assert list(split_by_prompt(groups, 0.5, seed=11).held_out) == [i for i, r in enumerate(ranks) if r in held]


def test_plain_text_without_a_prompt_is_split_row_by_row() -> None:
    groups = [group([1], completion(5, n), row=n) for n in range(1, 11)]
    split = split_by_prompt(groups, 0.2, seed=0)
    assert (len(split.train), len(split.held_out)) == (8, 2)


def test_nothing_is_held_out_at_share_zero() -> None:
    groups = random_groups([(3, 2), (3, 2)])
    split = split_by_prompt(groups, 0.0, seed=0)
    assert (split.train.tolist(), split.held_out.tolist()) == ([0, 1], [])


def test_sequence_keys_tell_prompt_completion_and_mask_apart() -> None:
    base = group([1, 2], completion(3, 4))
    others = [
        group([1], completion(2, 3, 4)),
        group([1, 2], completion(3, 5)),
        group([1, 2], completion(3, 4, trainable=[True, False])),
    ]
    keys = {g.sequence_key(0) for g in (base, *others)}
    assert len(keys) == 4
    assert group([1, 2], completion(9), completion(3, 4)).sequence_key(1) == base.sequence_key(0)
    assert base.prompt_ids.dtype == np.int32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_copied_ahead_are_the_same() -> None:
    parts = [random_groups([(4, 3, 5), (2, 6, 1)], seed) for seed in range(5)]
    device = torch.device("cuda")
    for part, batch in zip(parts, feed(parts, device), strict=True):
        expected = pack(part)
        assert torch.equal(batch.input_ids.cpu(), expected.input_ids)
        assert torch.equal(batch.layout.cu_seq_k.cpu(), expected.layout.cu_seq_k)
        assert batch.groups == tuple(part)


def test_batches_are_fed_in_order() -> None:
    parts = [random_groups([(4, 3, 5), (2, 6, 1)], seed) for seed in range(3)]
    fed = list(feed(parts, torch.device("cpu")))
    assert [batch.groups for batch in fed] == [tuple(part) for part in parts]
    assert list(feed([], torch.device("cpu"))) == []
