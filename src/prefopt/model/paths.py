"""Which path a model's log-probabilities or scores take: found by inspection, proved on the first batch.

The proof is against transformers' own logits, one sequence at a time: all paths share our head, so
they would agree with each other about a logit scale that nobody knew of.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.pack import PackedBatch
from prefopt.errors import ModelError
from prefopt.model.attention import UnsharableError, cannot_pack, cannot_share
from prefopt.model.logprobs import (
    Path,
    plain_attention,
    plain_model,
    sequence_ids,
    sequence_logprob_sum,
    set_attention,
)

__all__ = ["PathChoice", "choose_path", "first_agreeing", "transformers_logprob_sum"]

_LAYOUT = {
    "shared": "prompts shared, no padding",
    "packed": "several sequences to a row, prompts not shared",
    "padded": "one padded row per completion",
}

# Largest difference of a sequence log-probability between the two paths (nats), times the square root of the
# number of scored tokens, whose roundings have either sign. float32: orders below what any layout mistake
# makes; bfloat16: 8 bits of mantissa.
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.12, torch.float16: 2e-2}


def transformers_logprob_sum(model: torch.nn.Module, batch: PackedBatch) -> Float[Tensor, " sequences"]:
    """The plain twin: transformers' own logits, one sequence at a time, no packing, no padding, no tiles."""
    plain = plain_model(model)
    set_attention(plain, plain_attention(plain))
    sums = []
    for number, ids in enumerate(sequence_ids(batch)):
        mine = batch.sequence_of_target == number
        logits = plain(input_ids=ids[None], use_cache=False).logits[0].float()
        position = batch.position_ids[batch.predictors[mine]]
        sums.append(torch.log_softmax(logits[position], dim=-1).gather(1, batch.targets[mine, None]).sum())
    return torch.stack(sums)


@dataclass(frozen=True)
class PathChoice:
    """Which path a run takes, why, and the largest difference to what transformers itself computes.

    Attributes:
        max_difference: Of a sequence on the first batch.
        of: What was compared, and its unit.
    """

    path: Path
    reason: str
    max_difference: float
    of: tuple[str, str] = ("log-probabilities", "nats a sequence")

    def __str__(self) -> str:
        what, unit = self.of
        return (
            f"{what}: {self.path} path ({_LAYOUT[self.path]}) - {self.reason}; "
            f"largest difference to transformers on the first batch {self.max_difference:.1e} {unit}"
        )


def choose_path(model: torch.nn.Module, batch: PackedBatch) -> PathChoice:
    """The first of shared, packed and padded that inspection allows and that agrees with transformers on `batch`.

    Raises:
        ModelError: no path gives transformers' log-probabilities, so the model does something
            to its logits that `model.head` does not know.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            truth = transformers_logprob_sum(model, batch)
            limit = _TOLERANCE[next(plain_model(model).parameters()).dtype] * batch.token_counts.clamp(min=1).sqrt()
            return first_agreeing(model, lambda path: sequence_logprob_sum(model, batch, path), truth, limit)
    finally:
        model.train(was_training)


def first_agreeing(
    model: torch.nn.Module,
    compute: Callable[[Path], Float[Tensor, " sequences"]],
    truth: Float[Tensor, " sequences"],
    limit: Float[Tensor, " sequences"],
    of: tuple[str, str] = PathChoice.of,
) -> PathChoice:
    """The first path that inspection allows and on which `compute` differs from `truth` by at most `limit`.

    Raises:
        ModelError: there is none.
    """

    def off(path: Path) -> tuple[bool, float]:
        difference = (compute(path) - truth).abs()
        return bool((difference <= limit).all()), float(difference.max())  # a NaN is not <= anything

    why: list[str] = []
    paths: tuple[tuple[Path, str | None], ...] = (
        ("shared", cannot_share(plain_model(model))),
        ("packed", cannot_pack(plain_model(model))),
        ("padded", None),
    )
    for path, reason in paths:
        if reason is None:
            try:
                agrees, difference = off(path)
                if agrees:
                    return PathChoice(path, "; ".join(why) or "checked against transformers", difference, of)
                reason = f"{path} differs from transformers by {difference:.1e} {of[1]}"
            except UnsharableError as error:
                reason = str(error)
        if reason not in why:
            why.append(reason)
    raise ModelError(
        f"The model's {of[0]} cannot be reproduced.",
        got=f"a difference of {difference:.2e} {of[1]} to transformers' own logits",
        expected=f"at most {float(limit.max()):.1e}",
        todo="Its head or its padding does something unknown; please report the model type.",
    )
