"""What PPO learns from: fresh samples of a batch of prompts, scored by reward, reference and value model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from prefopt.config import PPOConfig
from prefopt.data.bins import batches_by_length
from prefopt.data.feed import feed
from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.data.store import token_counts
from prefopt.data.tokenize import Renderer
from prefopt.model.sample import Sampled, sample
from prefopt.records import Content
from prefopt.rewards import Reward

__all__ = ["Rollout", "Scores", "collect", "first_samples"]

_TRIED = 8  # prompts


@dataclass(frozen=True)
class Scores:
    """Of the targets of one packed batch.

    Attributes:
        plain: Log-probabilities of the policy itself, as the sampler gives them.
        logprobs: Of the policy at the sampling temperature.
        reference: Of the reference, at the same temperature.
        entropy: Of the policy's next-token distributions, nats.
        values: Of the value model.
    """

    plain: Float[Tensor, " targets"]
    logprobs: Float[Tensor, " targets"]
    reference: Float[Tensor, " targets"]
    entropy: Float[Tensor, " targets"]
    values: Float[Tensor, " targets"]


@dataclass(frozen=True)
class Rollout:
    """Samples of a batch of prompts. Targets stand group after group, as in `groups`.

    Attributes:
        groups: Each prompt with its samples; `place` is its number here.
        texts: Of each sequence.
        rewards: What the reward says of each sequence.
        finished: Whether it ended by itself.
        token_counts: Tokens of each sequence.
        starts: The first target of each group, and behind the last one's end.
        scores: Of all targets.
        drawn: What the sampler itself said of them: log-probabilities of the policy, not tempered.
    """

    groups: tuple[CompletionGroup, ...]
    texts: tuple[str, ...]
    rewards: Float64[np.ndarray, " sequences"]
    finished: Bool[np.ndarray, " sequences"]
    token_counts: Int[Tensor, " sequences"]
    starts: Int[np.ndarray, " groups_and_end"]
    scores: Scores
    drawn: Float[Tensor, " targets"]

    @classmethod
    def blank(cls, prompts: Sequence[CompletionGroup], config: PPOConfig, device: torch.device) -> "Rollout":
        """As large as rollouts get, and nothing in it: what a training step costs is tried out on it."""
        longest = np.argsort(-token_counts(prompts), kind="stable")[: config.batch_prompts]
        ids = np.zeros(config.max_new_tokens, dtype=np.int32)
        samples = (Completion(ids, np.ones(len(ids), dtype=bool)),) * config.completions
        groups = [replace(prompts[int(i)], completions=samples, place=n) for n, i in enumerate(longest)]
        sequences = len(groups) * config.completions
        targets = sequences * config.max_new_tokens
        return cls(
            groups=tuple(groups),
            texts=("",) * sequences,
            rewards=np.zeros(sequences),
            finished=np.zeros(sequences, dtype=bool),
            token_counts=torch.full((sequences,), config.max_new_tokens, device=device),
            starts=np.arange(len(groups) + 1) * config.completions * config.max_new_tokens,
            scores=Scores(*torch.zeros(5, targets, device=device)),
            drawn=torch.zeros(targets, device=device),
        )

    def targets_of(self, batch: PackedBatch) -> Int[Tensor, " targets"]:
        """Where the targets of a batch of these groups stand in the rollout's tensors."""
        return _places(self.starts, batch.groups).to(self.token_counts.device)

    @property
    def log_ratios(self) -> Float[Tensor, " targets"]:
        """log pi(token) - log pi_ref(token), nats."""
        return self.scores.logprobs - self.scores.reference

    def sequence_sum(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " sequences"]:
        """Summed over each sequence's tokens."""
        sequence = torch.repeat_interleave(self.token_counts)
        return values.new_zeros(len(self.token_counts)).index_add(0, sequence, values)

    def metrics(self) -> dict[str, float]:
        """What the samples say by themselves: means over sequences, the entropy over tokens."""
        return {
            "reward": float(self.rewards.mean()),
            "reward/std": float(self.rewards.std()),
            "kl": float(self.sequence_sum(self.log_ratios).double().mean()),
            "entropy": float(self.scores.entropy.double().mean()),
            "lengths/sampled": float(self.token_counts.double().mean()),
            "finished": float(self.finished.mean()),
            "ratio/sampled": float((self.scores.plain - self.drawn).abs().max().exp()),
        }


def collect(
    policy: torch.nn.Module,
    prompts: Sequence[CompletionGroup],
    contents: Sequence[Content],
    renderer: Renderer,
    reward: Reward,
    score: Callable[[PackedBatch], Scores],
    *,
    completions: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokens_per_batch: int,
) -> Rollout:
    """Sample every prompt, ask the reward, then score all samples in micro-batches.

    Args:
        prompts: Groups without completions.
        contents: What each prompt says.
        score: Under policy, reference and value model.

    Raises:
        RewardError: the reward fails on a sample.
    """
    drawn = sample(
        policy,
        [group.prompt_ids for group in prompts],
        completions=completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=renderer.stop_ids,
        seed=seed,
    )
    texts = [renderer.decode(one.ids) for one in drawn]
    rewards = reward.score([contents[one.prompt_index] for one in drawn], texts)
    groups = _sampled(prompts, drawn)
    device = next(policy.parameters()).device
    counts = torch.tensor([len(one.ids) for one in drawn], device=device)
    starts = np.cumsum([0, *(sum(len(c.ids) for c in group.completions) for group in groups)])
    return Rollout(
        groups=tuple(groups),
        texts=tuple(texts),
        rewards=rewards,
        finished=np.array([one.finished for one in drawn]),
        token_counts=counts,
        starts=starts,
        scores=_scored(groups, starts, score, tokens_per_batch, device),
        drawn=torch.from_numpy(np.concatenate([one.logprobs for one in drawn])).to(device),
    )


def _sampled(prompts: Sequence[CompletionGroup], drawn: Sequence[Sampled]) -> list[CompletionGroup]:
    """Each prompt with its samples, in prompt order; every token is scored."""
    found: list[list[Completion]] = [[] for _ in prompts]
    for one in drawn:
        found[one.prompt_index].append(Completion(one.ids, np.ones(len(one.ids), dtype=bool)))
    return [
        replace(group, completions=tuple(samples), place=number)
        for number, (group, samples) in enumerate(zip(prompts, found, strict=True))
    ]


def first_samples(
    model: torch.nn.Module, prompts: Sequence[CompletionGroup], renderer: Renderer, config: PPOConfig
) -> list[CompletionGroup]:
    """A few samples of the first prompts, to try a path of log-probabilities on."""
    few = [prompts[i] for i in range(min(len(prompts), _TRIED))]
    drawn = sample(
        model,
        [group.prompt_ids for group in few],
        completions=min(config.completions, 2),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=renderer.stop_ids,
        seed=config.seed,
    )
    return _sampled(few, drawn)


@torch.no_grad()
def _scored(
    groups: Sequence[CompletionGroup],
    starts: Int[np.ndarray, " groups_and_end"],
    score: Callable[[PackedBatch], Scores],
    tokens_per_batch: int,
    device: torch.device,
) -> Scores:
    found = torch.zeros(5, int(starts[-1]), device=device)
    for batch in feed(batches_by_length(groups, tokens_per_batch), device):
        part = score(batch)
        places = _places(starts, batch.groups).to(device)
        found[:, places] = torch.stack([part.plain, part.logprobs, part.reference, part.entropy, part.values])
    return Scores(*found)


def _places(starts: Int[np.ndarray, " groups_and_end"], groups: Sequence[CompletionGroup]) -> Int[Tensor, " targets"]:
    numbers = [group.place for group in groups if group.place is not None]
    return torch.from_numpy(np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers]))
