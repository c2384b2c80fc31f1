"""Exact KL divergence between policy and reference, over the whole vocabulary, along given completions.

Summed over a completion's tokens it is the sequence KL with the contexts of that completion: along
samples of the policy an unbiased estimate of KL(pi || pi_ref) with the token distributions summed
out (lower variance than log-ratios); along held-out completions the same quantity in the data's
contexts, comparable from step to step.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.pack import PackedBatch
from prefopt.model.head import Head, head_of
from prefopt.model.logprobs import Path, plain_model, target_hidden
from prefopt.model.statistics import target_statistics

__all__ = ["ReferenceStates", "sequence_kl_sum", "sequence_kl_sum_of_batch"]


@dataclass(frozen=True)
class ReferenceStates:
    """What the reference left behind so that it need not stay in memory: hidden states and its head."""

    hidden: tuple[Float[Tensor, "_ hidden"], ...]
    head: Head

    @classmethod
    @torch.no_grad()
    def of(cls, model: torch.nn.Module, batches: list[PackedBatch], path: Path) -> "ReferenceStates":
        """Run the reference once over `batches`; the head is copied, since training moves it in place."""
        kept = head_of(plain_model(model)).copied()
        return cls(tuple(target_hidden(model, batch, path).cpu() for batch in batches), kept)


@torch.no_grad()
def sequence_kl_sum(
    policy: torch.nn.Module, reference: ReferenceStates, batches: list[PackedBatch], path: Path
) -> Float[Tensor, " sequences"]:
    """sum_t KL(pi(.|x, y_<t) || pi_ref(.|x, y_<t)) per sequence of `batches`, in nats.

    Args:
        reference: `ReferenceStates.of(reference, batches, path)` for the very same batches.
    """
    head = head_of(plain_model(policy))
    sums = []
    for batch, reference_hidden in zip(batches, reference.hidden, strict=True):
        hidden = target_hidden(policy, batch, path)
        sums.append(_summed(batch, (head, hidden), (reference.head, reference_hidden.to(hidden.device))))
    return torch.cat(sums) if sums else torch.zeros(0)


@torch.no_grad()
def sequence_kl_sum_of_batch(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    batch: PackedBatch,
    paths: tuple[Path, Path],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " sequences"]:
    """The same for one batch, with both models in memory and their logits divided by `temperature`.

    Args:
        paths: The policy's and the reference's.
    """
    mine, theirs = (
        (head_of(plain_model(model)).tempered(temperature), target_hidden(model, batch, path))
        for model, path in zip((policy, reference), paths, strict=True)
    )
    return _summed(batch, mine, theirs)


def _summed(
    batch: PackedBatch, mine: tuple[Head, Float[Tensor, "targets _"]], theirs: tuple[Head, Float[Tensor, "targets _"]]
) -> Float[Tensor, " sequences"]:
    kl = target_statistics(*mine, batch.targets, against=theirs).kl
    assert kl is not None
    return kl.new_zeros(batch.sequences).index_add(0, batch.sequence_of_target, kl)
