"""A reference that follows the policy (TR-DPO: Gorbatovski et al. 2024, arXiv 2404.09656)."""

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.data.pack import PackedBatch
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

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep."""
        return dict(self._model.named_parameters())

    def learn(self) -> None:
        """A training step is done, in this process or before a resumption."""
        self._done += 1

    @torch.no_grad()
    def prepare(self) -> None:
        """Follow the policy, if the step ahead is one to do so before."""
        if self._done and self._done % self._every == 0:
            for mine, policys in zip(self._model.parameters(), self._policy.parameters(), strict=True):
                mine.lerp_(policys, self._share)

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Float[Tensor, "pairs 2"]:
        """Sums of the batch's pairs, chosen first."""
        return sequence_logprob_sum(self._model, batch, self._path).view(-1, 2)
