"""A reference that follows the policy (TR-DPO: Gorbatovski et al. 2024, arXiv 2404.09656)."""

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.pack import PackedBatch
from prefopt.errors import ModelError
from prefopt.model.logprobs import Path, sequence_logprob_sum

__all__ = ["MovingReference"]


class MovingReference:
    """The reference's own weights, moved towards the policy's before every n-th step.

        reference = share * policy + (1 - share) * reference

    Args:
        model: A copy of the starting reference.
        policy: What it follows; parameters of the same names and shapes.
        every: n.
        share: In (0, 1]; 1 replaces the reference wholly.
    """

    def __init__(
        self, model: torch.nn.Module, policy: torch.nn.Module, path: Path, *, every: int, share: float
    ) -> None:
        self._model, self._policy, self._path = model.requires_grad_(False).eval(), policy, path
        self._every, self._share = every, share
        self._done = 0
        self._moved = torch.zeros((), dtype=torch.long)  # before which step it moved last; kept with the weights
        mine, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (model, policy))
        if mine != theirs:
            raise ModelError(
                "The reference cannot follow the policy: their weights are not alike.",
                got=", ".join(sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))[:3]),
                expected="a reference of the policy's architecture and size",
                todo="Leave out --move-reference-every, or take another --reference.",
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep."""
        return {**dict(self._model.named_parameters()), "moved": self._moved}

    def learn(self) -> None:
        """A training step is done, in this process or before a resumption."""
        self._done += 1

    @torch.no_grad()
    def prepare(self) -> None:
        """Follow the policy, if the step ahead is one to do so before."""
        if self._done and self._done % self._every == 0 and int(self._moved) != self._done:
            self._moved.fill_(self._done)
            for mine, policys in zip(self._model.parameters(), self._policy.parameters(), strict=True):
                mine.lerp_(policys, self._share)

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Float[Tensor, "pairs 2"]:
        """Sums of the batch's pairs, chosen first."""
        return sequence_logprob_sum(self._model, batch, self._path).view(-1, 2)
