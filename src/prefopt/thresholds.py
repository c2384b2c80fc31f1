"""What rated completions are measured against: KTO's reference point and BCO's reward shift, step by step.

Both are constants of a step, the same for all of its micro-batches. KTO's is computed from the
step's rows before it begins; BCO's follows from the metrics of the steps before, so that a resumed
run, which reads them again, has the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.bins import batches_by_length
from prefopt.data.feed import feed
from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.data.store import GroupStore
from prefopt.errors import DataError
from prefopt.losses import kto_kl
from prefopt.objectives import Term
from prefopt.preference import inputs_of

__all__ = ["RewardShift", "Thresholds", "mismatched"]

Score = Callable[[PackedBatch], Float[Tensor, " sequences"]]
# Rows of one split, their mismatched twins, and what the reference makes of the twins.
Twins = tuple[GroupStore, GroupStore, Float[Tensor, "rows 1"]]


class Thresholds:
    """`kl` and `reward_shift` as far as the loss takes them.

    Args:
        inputs: Names of the tensors the loss takes.
        twins: By split, where `kl` is among them.
        score: Sums under the policy of a batch.
        policy: Switched to evaluation while it scores.
    """

    def __init__(
        self,
        inputs: frozenset[str],
        terms: Sequence[Term],
        twins: Mapping[str, Twins],
        score: Score,
        policy: torch.nn.Module,
    ) -> None:
        self._points = {name: _ReferencePoint(*made, score, policy) for name, made in twins.items()}
        shifted = [term for term in terms if "reward_shift" in inputs_of([term])]
        self._shift = RewardShift(float(shifted[0].parameters["beta"])) if shifted else None
        self._kl: Tensor | None = torch.zeros(()) if "kl" in inputs else None

    def prepare(self, split: str, rows: Sequence[CompletionGroup], tokens_per_batch: int) -> None:
        """Find the thresholds of a step over `rows`."""
        if self._kl is not None:
            self._kl = self._points[split].kl(rows, tokens_per_batch)
        if self._shift is not None:
            self._shift.prepare(rows)

    def tensors(self) -> dict[str, Tensor]:
        """The thresholds by the names that losses give them."""
        found = {} if self._kl is None else {"kl": self._kl}
        return found if self._shift is None else {**found, "reward_shift": torch.tensor(self._shift.value)}

    def metrics(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `learn` will want to know of the step, per group."""
        return {} if self._shift is None else self._shift.metrics(tensors)

    def learn(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a training step that is done."""
        if self._shift is not None:
            self._shift.learn(metrics)


def mismatched(groups: Sequence[CompletionGroup], max_length: int) -> GroupStore:
    """Each group's prompt with the completion of the next group of another prompt, cyclically, in their order.

    A completion that does not fit behind the longer prompt loses its end; it is not trained on.

    Raises:
        DataError: there is one prompt only.
    """

    def partner_of(i: int) -> Completion:
        own = groups[i].prompt_ids
        for step in range(1, len(groups)):
            other = groups[(i + step) % len(groups)]
            if not np.array_equal(other.prompt_ids, own):
                return other.completions[0]
        raise DataError(
            "KTO measures against completions of other prompts, and there are none.",
            where=str(groups[i].source),
            got=f"{len(groups)} rows of one prompt",
            expected="rows of two prompts or more on either side of the split",
            todo="Add rows, or hold none out: --eval-share 0.",
        )

    def made(i: int) -> CompletionGroup:
        prompt, partner = groups[i], partner_of(i)
        room = max(1, max_length - len(prompt.prompt_ids))
        return replace(prompt, completions=(Completion(partner.ids[:room], partner.trainable[:room]),))

    return GroupStore.write(made(i) for i in range(len(groups)))


class _ReferencePoint:
    """KTO's `kl` of the rows of a step, from their mismatched twins (see `losses.kto_kl`).

    Args:
        rows: A split.
        twins: `mismatched` of it.
        reference: Their sums under the reference, as `twins` has them.
        score: Sums under the policy of a batch.
    """

    def __init__(
        self,
        rows: GroupStore,
        twins: GroupStore,
        reference: Float[Tensor, "rows 1"],
        score: Score,
        policy: torch.nn.Module,
    ) -> None:
        self._policy = policy
        self._twins, self._reference = twins, reference
        self._number_of = {int(place): number for number, place in enumerate(rows.places)}
        self._score = score

    @torch.no_grad()
    def kl(self, rows: Sequence[CompletionGroup], tokens_per_batch: int) -> Float[Tensor, ""]:
        """Of a step over `rows`."""
        numbers = [self._number_of[row.place] for row in rows if row.place is not None]
        twins = self._twins.take(np.array(numbers, dtype=np.int64))
        policy, reference = [], []
        training = self._policy.training
        self._policy.eval()  # no dropout: it is a constant
        for batch in feed(batches_by_length(twins, tokens_per_batch), self._reference.device):
            policy.append(self._score(batch))
            reference.append(self._reference[batch.places, 0])
        self._policy.train(training)
        return kto_kl(policy=torch.cat(policy), reference=torch.cat(reference))


class RewardShift:
    """BCO's delta: beta times the mean, over the steps so far, of half the sum of both kinds' mean log-ratios.

    Steps that have rows of one kind alone are left out of it.

    Args:
        beta: Of the term it is for.
    """

    def __init__(self, beta: float) -> None:
        self._beta, self._sum, self._steps = beta, 0.0, 0
        self._shares: tuple[float, float] | None = None

    @property
    def value(self) -> float:
        """In the rewards' units; 0 to begin with."""
        return self._beta * self._sum / self._steps if self._steps else 0.0

    def prepare(self, rows: Sequence[CompletionGroup]) -> None:
        """Count the kinds among the rated rows of a step."""
        good = sum(row.label > 0.5 for row in rows)
        self._shares = (good / len(rows), 1 - good / len(rows)) if 0 < good < len(rows) else None

    def metrics(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per group, so that the step's means are those of each kind: mean log-ratio, nats."""
        if "policy_chosen" in tensors:
            sides = {side: tensors[f"policy_{side}"] - tensors[f"reference_{side}"] for side in ("chosen", "rejected")}
            return {f"logratios/{side}": ratio.detach() for side, ratio in sides.items()}
        if self._shares is None:
            return {}
        ratios, good = (tensors["policy"] - tensors["reference"]).detach(), tensors["desirable"]
        return {
            "logratios/chosen": ratios * good / self._shares[0],
            "logratios/rejected": ratios * ~good / self._shares[1],
        }

    def learn(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a training step that is done."""
        if "logratios/chosen" in metrics:
            self._sum += (metrics["logratios/chosen"] + metrics["logratios/rejected"]) / 2
            self._steps += 1
