"""From the terms of a loss to one function of log-probabilities, and those of a packed batch of pairs by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from prefopt import losses
from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.losses import LossTotal, weighted_sum
from prefopt.objectives import Term

__all__ = [
    "Grouped",
    "by_group",
    "combined",
    "heads_of",
    "inputs_of",
    "needs_reference",
    "pair_tensors",
    "ranking_tensors",
    "rating_tensors",
    "wpo_tensors",
]

_FUNCTIONS = {"sft": "sequence_mean_nll"}  # where a name says more than the equation's


def combined(terms: Sequence[Term]) -> Callable[[Mapping[str, Tensor]], LossTotal]:
    """The loss of a micro-batch from its tensors by name, those of `inputs_of(terms)` among them.

    A single term of weight 1 is the objective itself; otherwise the weighted sum.
    """
    single = len(terms) == 1 and terms[0].weight == 1

    def compute(tensors: Mapping[str, Tensor]) -> LossTotal:
        totals = {term.name: (term.weight, _compute(term, tensors)) for term in terms}
        return totals[terms[0].name][1] if single else weighted_sum(totals)

    return compute


def inputs_of(terms: Sequence[Term]) -> frozenset[str]:
    """Names of the tensors that the terms' functions take."""
    return frozenset(name for term in terms for name in _arguments(term) if name not in type(term).model_fields)


def needs_reference(terms: Sequence[Term]) -> bool:
    """Whether any term compares with a reference."""
    return any(name.startswith("reference") for name in inputs_of(terms))


def _compute(term: Term, tensors: Mapping[str, Tensor]) -> LossTotal:
    given = {name: tensors[name] for name in _arguments(term) if name in tensors}
    total: LossTotal = _function(term)(**given, **term.parameters)
    return total


def _arguments(term: Term) -> Mapping[str, Any]:
    return inspect.signature(_function(term)).parameters


def _function(term: Term) -> Callable[..., LossTotal]:
    function: Callable[..., LossTotal] = getattr(losses, _FUNCTIONS.get(term.name, term.name))
    return function


def pair_tensors(
    batch: PackedBatch,
    logprobs: Float[Tensor, " targets"],
    reference: Float[Tensor, "pairs 2"] | None,
    reference_heads: Float[Tensor, "pairs 2"] | None = None,
) -> dict[str, Tensor]:
    """The tensors that objectives over pairs take, by name: sums over tokens, per pair, in nats.

    A completion's head is its first tokens, as many as the shorter of the pair has; the rest is its tail.

    Args:
        logprobs: Of every target of `batch` under the policy.
        reference: Sums under the reference, chosen first; and those of the heads, where they are needed.
    """
    found = _of_sides("policy", _by_sequence(batch, logprobs).view(-1, 2))
    found |= _of_sides("", batch.token_counts.view(-1, 2), "_tokens")
    # Likelihood is that of the chosen completion.
    found |= {"logprob_sum": found["policy_chosen"], "token_counts": found["chosen_tokens"], "weights": batch.weights}
    found |= {"chosen_wins": batch.labels, "rejected_wins": 1 - batch.labels}
    if reference is not None:
        found |= _of_sides("reference", reference)
    if reference is not None and reference_heads is not None:
        heads = _by_sequence(batch, logprobs * _in_head(batch)).view(-1, 2)
        sums = torch.stack([found["policy_chosen"], found["policy_rejected"]], dim=1)
        found |= _of_sides("policy", heads, "_head") | _of_sides("policy", sums - heads, "_tail")
        found |= _of_sides("reference", reference_heads, "_head")
        found |= _of_sides("reference", reference - reference_heads, "_tail")
    return found


def _of_sides(whose: str, values: Shaped[Tensor, "pairs 2"], what: str = "") -> dict[str, Tensor]:
    front = f"{whose}_" if whose else ""
    return {f"{front}chosen{what}": values[:, 0], f"{front}rejected{what}": values[:, 1]}


def wpo_tensors(
    batch: PackedBatch, tensors: Mapping[str, Tensor], collision: Float[Tensor, " targets"] | None
) -> dict[str, Tensor]:
    """What `losses.wpo_weights` takes.

    Args:
        tensors: `pair_tensors` of the batch.
        collision: Of every target of `batch`: `model.statistics`.
    """
    assert collision is not None
    sums = _by_sequence(batch, collision).view(-1, 2)
    names = ("policy_chosen", "policy_rejected", "chosen_tokens", "rejected_tokens")
    taken = {name: tensors[name].detach() for name in names}
    return {**taken, "chosen_log_collision": sums[:, 0], "rejected_log_collision": sums[:, 1]}


def rating_tensors(
    batch: PackedBatch, logprobs: Float[Tensor, " targets"], reference: Float[Tensor, "rows 1"] | None
) -> dict[str, Tensor]:
    """The tensors that objectives over rated completions take, by name."""
    assert reference is not None
    return {
        "policy": _by_sequence(batch, logprobs),
        "reference": reference[:, 0],
        "desirable": batch.labels > 0.5,
        "soft_labels": torch.maximum(batch.labels, 1 - batch.labels),  # that `desirable` is right
        "weights": batch.weights,
    }


def ranking_tensors(
    batch: PackedBatch, logprobs: Float[Tensor, " targets"], reference: Float[Tensor, "groups most"] | None
) -> dict[str, Tensor]:
    """The tensors that objectives over rankings take, by name: [groups, K], the best completion first.

    K is the batch's largest; smaller groups are filled up with zeros, where `present` is False.
    """
    assert reference is not None
    policy = by_group(batch, _by_sequence(batch, logprobs))
    return {
        "policy": policy.values,
        "reference": reference[:, : policy.values.shape[1]].nan_to_num(0.0),
        "present": policy.present,
        "weights": batch.weights,
    }


@dataclass(frozen=True)
class Grouped:
    """A number for each completion of each group; 0 where a group has fewer than others, and `present` False."""

    values: Float[Tensor, "groups k"]
    present: Bool[Tensor, "groups k"]


def by_group(batch: PackedBatch, values: Float[Tensor, " sequences"]) -> Grouped:
    """What belongs to sequences, group by group; differentiable."""
    sizes = [len(group.completions) for group in batch.groups]
    k = max(sizes)
    slots = [row * k + place for row, size in enumerate(sizes) for place in range(size)]
    at = torch.tensor(slots, device=values.device)
    filled = values.new_zeros(len(sizes) * k).index_copy(0, at, values)
    present = torch.zeros(len(sizes) * k, dtype=torch.bool, device=values.device)
    present[at] = True
    return Grouped(filled.view(-1, k), present.view(-1, k))


def heads_of(pair: CompletionGroup) -> CompletionGroup:
    """The pair with the tokens of both completions' heads alone to be scored."""
    shorter = min(c.scored_tokens for c in pair.completions)
    return replace(pair, completions=tuple(_cut(c, shorter) for c in pair.completions))


def _cut(completion: Completion, tokens: int) -> Completion:
    return Completion(completion.ids, completion.trainable & (completion.trainable.cumsum() <= tokens))


def _by_sequence(batch: PackedBatch, values: Float[Tensor, " targets"]) -> Float[Tensor, " sequences"]:
    return values.new_zeros(batch.sequences).index_add(0, batch.sequence_of_target, values)


def _in_head(batch: PackedBatch) -> Bool[Tensor, " targets"]:
    """Whether a target is among the first of its completion, as many as the shorter one of its pair has."""
    counts = batch.token_counts
    first = counts.cumsum(0) - counts
    shorter = counts.view(-1, 2).amin(dim=1).repeat_interleave(2)
    sequence = batch.sequence_of_target
    place = torch.arange(len(sequence), device=sequence.device) - first[sequence]
    return place < shorter[sequence]
