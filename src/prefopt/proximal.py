"""One PPO update: a rollout, its advantages, and the passes of training over it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefopt.config import PPOConfig
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch
from prefopt.data.tokenize import Renderer
from prefopt.losses import LossTotal
from prefopt.losses.ppo import (
    adapted_kl_coef,
    explained_variance,
    generalized_advantages,
    ppo,
    token_rewards,
    whiten,
)
from prefopt.model.head import head_of, target_logprobs
from prefopt.model.load import LoadedModel
from prefopt.model.logprobs import Path, plain_model, target_hidden
from prefopt.model.policy import make_policy
from prefopt.model.statistics import target_statistics
from prefopt.model.values import ValueModel
from prefopt.progress import say, warn
from prefopt.records import Content, Source
from prefopt.rewards import Reward
from prefopt.rollout import Rollout, Scores, collect
from prefopt.run import RunFolder
from prefopt.train.optimizer import Masters
from prefopt.train.step import StepResult, train_step

__all__ = ["Lesson", "Proximal"]

_SHOWN = 4  # samples that a step leaves in events.jsonl
_NO_SPREAD = 1e-8  # of the mean: what rounding makes of rewards that are all alike


@dataclass
class Lesson:
    """What a rollout teaches: constants of its update, per target.

    Attributes:
        advantages: Whitened.
        farthest: Largest |log ratio| of policy to sampler in the first minibatch, which should be 0.
    """

    advantages: Float[Tensor, " targets"]
    returns: Float[Tensor, " targets"]
    farthest: list[Float[Tensor, ""]] = field(default_factory=list)
    first: bool = True


class Proximal:
    """Policy, value model and reference, and how a step of the run moves the first two.

    Attributes:
        networks: What is trained: `policy` and `value`.
        kept: The sampler's state, for checkpoints: which batch of samples is next, the price of its KL, and
            what the reward is shifted and divided by.
    """

    def __init__(
        self,
        config: PPOConfig,
        run: RunFolder,
        loaded: LoadedModel,
        reference: LoadedModel,
        path: Path,
        reference_path: Path,
        value: ValueModel,
        renderer: Renderer,
        reward: Reward,
        contents: Mapping[Source, Content],
        steps: int,
    ) -> None:
        self.config, self.run = config, run
        self.path, self.reference_path = path, reference_path
        self.renderer, self.reward, self.contents = renderer, reward, contents
        # Samples are new in every step, so the reference stays in memory: as a model of its own, or under
        # an adapter that is switched off.
        self.frozen: torch.nn.Module | None = None
        if reference is not loaded:
            self.frozen = reference.model.requires_grad_(False)
        elif config.lora_rank is None:
            self.frozen = copy.deepcopy(loaded.model).requires_grad_(False)
        self.value = value
        self.policy = make_policy(loaded.model, config, steps=steps)
        self.networks = torch.nn.ModuleDict({"policy": self.policy, "value": self.value})
        self.kept = {
            "iteration": torch.zeros((), dtype=torch.int64),
            "kl_coef": torch.tensor(config.kl_coef, dtype=torch.float64),
            "reward_mean": torch.zeros((), dtype=torch.float64),
            "reward_sd": torch.ones((), dtype=torch.float64),
        }

    def normalize(self, prompts: Sequence[CompletionGroup], tokens_per_batch: int) -> None:
        """If asked for, learn shift and scale of the reward from samples of the starting model.

        Ziegler et al. 2019, section 2.1. A value model starts at zero. If rewards were far from zero, every
        token shortly before an end would look better than expected, and the policy would learn to end.
        """
        if not self.config.normalize_reward:
            return
        drawn = self._rollout(list(prompts), self.config.completions, [self.config.seed, 3], tokens_per_batch)
        mean, sd = float(drawn.rewards.mean()), float(drawn.rewards.std())
        if sd <= _NO_SPREAD * max(1.0, abs(mean)):
            warn(f"the reward says {mean:g} of every first sample: shifted, not scaled; there is little to learn")
            sd = 1.0
        self.kept["reward_mean"].fill_(mean)
        self.kept["reward_sd"].fill_(sd)
        self.run.event("normalized", step=0, mean=mean, sd=sd, samples=len(drawn.rewards))
        say(f"reward: (reward {-mean:+.4g}) / {sd:.4g}, by {len(drawn.rewards):,} samples of the starting model")
        if self.config.value_from == "reward":  # its head says rewards as they were
            with torch.no_grad():
                self.value.head.bias.sub_(mean)
                for parameter in self.value.head.parameters():
                    parameter.div_(sd)

    def score(self, batch: PackedBatch) -> Scores:
        """Policy, reference and value model on samples; all at the sampling temperature."""
        head, temperature = head_of(plain_model(self.policy)), self.config.temperature
        hidden = target_hidden(self.policy, batch, self.path)
        own = target_statistics(head.tempered(temperature), hidden, batch.targets, entropy=True)
        assert own.entropy is not None
        plain = own.logprob if temperature == 1 else target_logprobs(head, hidden, batch.targets)
        if self.frozen is not None:
            reference = self._logprobs(self.frozen, batch, self.reference_path)
        else:
            with self.policy.disable_adapter():  # type: ignore[operator]
                reference = self._logprobs(self.policy, batch, self.path)
        return Scores(plain, own.logprob, reference, own.entropy, self.value(batch))

    def _logprobs(self, model: torch.nn.Module, batch: PackedBatch, path: Path) -> Float[Tensor, " targets"]:
        head = head_of(plain_model(model)).tempered(self.config.temperature)
        logprobs: Tensor = target_logprobs(head, target_hidden(model, batch, path), batch.targets)
        return logprobs

    def lesson(self, rollout: Rollout) -> Lesson:
        """Rewards of tokens, whitened if asked for; advantages, whitened; returns."""
        config, counts = self.config, rollout.token_counts
        # A new tensor: what is logged stays the reward's own.
        mean, sd = float(self.kept["reward_mean"]), float(self.kept["reward_sd"])
        scores = (torch.from_numpy(rollout.rewards).to(counts.device) - mean) / sd
        if config.missing_eos_reward is not None:
            scores[torch.from_numpy(~rollout.finished)] = config.missing_eos_reward
        rewards = token_rewards(
            scores=scores.float(),
            log_ratios=rollout.log_ratios,
            token_counts=counts,
            kl_coef=float(self.kept["kl_coef"]),
        )
        if config.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        found = generalized_advantages(
            rewards=rewards, values=rollout.scores.values, token_counts=counts, gamma=config.gamma, lam=config.lam
        )
        return Lesson(whiten(found.advantages), found.returns)

    def loss(self, batch: PackedBatch, rollout: Rollout, lesson: Lesson) -> LossTotal:
        """The clipped losses of a micro-batch of the rollout's groups."""
        at, config = rollout.targets_of(batch), self.config
        logprobs, old = self._logprobs(self.policy, batch, self.path), rollout.scores.logprobs[at]
        if lesson.first:
            lesson.farthest.append((logprobs.detach() - old).abs().max())
        tokens = torch.tensor([group.scored_tokens for group in batch.groups], device=at.device)
        return ppo(
            logprobs=logprobs,
            old_logprobs=old,
            advantages=lesson.advantages[at],
            values=self.value(batch),
            old_values=rollout.scores.values[at],
            returns=lesson.returns[at],
            group_of_target=torch.repeat_interleave(tokens),
            groups=len(batch.groups),
            clip=config.clip,
            value_clip=config.value_clip,
            value_coef=config.value_coef,
        )

    def update(
        self,
        groups: Sequence[CompletionGroup],
        optimizer: torch.optim.Optimizer,
        masters: Masters,
        tokens_per_batch: int,
    ) -> StepResult:
        """A step of the run."""
        config, number = self.config, int(self.kept["iteration"])
        rollout = self._rollout(groups, config.completions, [config.seed, 1, number], tokens_per_batch)
        lesson = self.lesson(rollout)
        made: list[StepResult] = []
        for part in _minibatches(config, number, len(groups)):
            made.append(
                train_step(
                    [rollout.groups[i] for i in part],
                    lambda batch: self.loss(batch, rollout, lesson),
                    _tokens,
                    optimizer,
                    masters,
                    tokens_per_batch=made[-1].tokens_per_batch if made else tokens_per_batch,
                    max_grad_norm=config.max_grad_norm,
                    device=rollout.token_counts.device,
                )
            )
            lesson.first = False
            if config.max_update_kl is not None and made[-1].metrics["update_kl"] > config.max_update_kl:
                break
        self.run.event("samples", step=number, samples=self._shown(rollout))
        metrics = {
            **rollout.metrics(),
            "kl_coef": float(self.kept["kl_coef"]),
            "explained_variance": explained_variance(rollout.scores.values, lesson.returns),
            "ratio/first": float(torch.stack(lesson.farthest).max().exp()),
            "updates": float(len(made)),
        }
        self._adapt(metrics["kl"], len(rollout.texts))
        return _together(made, metrics)

    def _rollout(
        self, groups: Sequence[CompletionGroup], completions: int, seed: list[int], tokens_per_batch: int
    ) -> Rollout:
        return collect(
            self.policy,
            groups,
            [self.contents[group.source] for group in groups],
            self.renderer,
            self.reward,
            self.score,
            completions=completions,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
            tokens_per_batch=tokens_per_batch,
        )

    def _adapt(self, kl: float, episodes: int) -> None:
        self.kept["iteration"].add_(1)
        if self.config.target_kl is not None:
            coefficient, target, horizon = float(self.kept["kl_coef"]), self.config.target_kl, self.config.kl_horizon
            self.kept["kl_coef"].fill_(
                adapted_kl_coef(coefficient, kl=kl, target=target, episodes=episodes, horizon=horizon)
            )

    def evaluate(self, held_out: Sequence[CompletionGroup], tokens_per_batch: int) -> dict[str, float]:
        """One sample of each held-out prompt, with the same noise every time: what differs is the policy."""
        rollout = self._rollout(list(held_out), 1, [self.config.seed, 0], tokens_per_batch)
        return {**rollout.metrics(), "prompts": len(held_out)}

    def far(self, metrics: Mapping[str, Any]) -> str | None:
        """What there is to say where the policy has gone as far from the reference as it may."""
        if self.config.max_kl is None or metrics["kl"] <= self.config.max_kl:
            return None
        return (
            f"the KL to the reference is {metrics['kl']:.2f} nats a sample, beyond max_kl {self.config.max_kl:g}: "
            "the run ends here; raise --kl-coef or lower --lr to go on for longer within it."
        )

    def _shown(self, rollout: Rollout) -> list[dict[str, Any]]:
        """The first sample of some prompts, for people."""
        kl, k = rollout.sequence_sum(rollout.log_ratios).tolist(), self.config.completions
        return [
            {
                "prompt": self.renderer.decode(group.prompt_ids),
                "completion": rollout.texts[k * number],
                "reward": float(rollout.rewards[k * number]),
                "kl": kl[k * number],
            }
            for number, group in enumerate(rollout.groups[:_SHOWN])
        ]


def _minibatches(config: PPOConfig, iteration: int, groups: int) -> Iterator[list[int]]:
    """Which groups are in each optimiser step: every group once a pass, in an order of its own."""
    for epoch in range(config.ppo_epochs):
        order = np.random.default_rng([config.seed, 2, iteration, epoch]).permutation(groups)
        yield from (part.tolist() for part in np.array_split(order, min(config.minibatches, groups)))


def _tokens(group: CompletionGroup) -> int:
    """The loss is divided by the number of sampled tokens."""
    return group.scored_tokens


def _together(made: Sequence[StepResult], metrics: Mapping[str, float]) -> StepResult:
    """Means over the optimiser steps of an update; the tokens of all of them."""
    return StepResult(
        loss=float(np.mean([one.loss for one in made])),
        grad_norm=float(np.mean([one.grad_norm for one in made])),
        metrics={**{k: float(np.mean([one.metrics[k] for one in made])) for k in made[0].metrics}, **metrics},
        tokens=sum(one.tokens for one in made),
        tokens_per_batch=made[-1].tokens_per_batch,
    )
