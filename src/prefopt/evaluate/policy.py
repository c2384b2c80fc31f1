"""Where a policy stands: its reward on fresh samples, and the KL to its reference that it paid for it.

The sequence KL is estimated as sum_t KL(pi(.|x, y_<t) || pi_ref(.|x, y_<t)) along the policy's own
samples y, each term exact over the vocabulary: the Rao-Blackwellised estimator (Amini, Vieira and
Cotterell 2025, arXiv 2504.10637), unbiased like the mean log-ratio log pi(y|x) - log pi_ref(y|x)
(Schulman's k1), never of more variance and never negative. It is of the completions as they are
sampled, so those that `max_new_tokens` cuts count up to there, and ending is a token like any other.

At a temperature T the policy is softmax(logits / T), the distribution that is sampled from, and its
reference is softmax(reference logits / T): the pair whose log-ratio PPO penalises when it divides
logits by T everywhere. At T = 1 these are the models themselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64

from prefopt.data.bins import micro_batches
from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.pack import pack
from prefopt.data.tokenize import Renderer
from prefopt.errors import ConfigError
from prefopt.model.kl import sequence_kl_sum_of_batch
from prefopt.model.logprobs import Path
from prefopt.model.paths import choose_path
from prefopt.progress import progress
from prefopt.records import Content, Source
from prefopt.rewards import Reward
from prefopt.sampling.completions import Completed, Settings
from prefopt.sampling.local import LocalCompleted, LocalModel

__all__ = ["PolicyPoint", "draw", "measure", "reward_of_samples", "sequence_kl"]

_BATCH_TOKENS = 4096  # of one forward pass of each model; on a CPU more would fall out of its caches
_SCORED = 512  # completions in one call of a reward


@dataclass(frozen=True)
class PolicyPoint:
    """A policy on the same prompts as others, each number a mean over the prompt's samples.

    The prompt is the unit of resampling: samples of one prompt are not independent evidence.

    Attributes:
        reward: Of the samples.
        kl: Sequence KL(policy || reference) along them, nats.
        tokens: Their length, the token that ended them counted.
        finished: Share of them that ended by themselves.
    """

    reward: Float64[np.ndarray, " prompts"]
    kl: Float64[np.ndarray, " prompts"]
    tokens: Float64[np.ndarray, " prompts"]
    finished: Float64[np.ndarray, " prompts"]


def measure(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    renderer: Renderer,
    prompts: Sequence[Content],
    reward: Reward,
    *,
    completions: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int,
    label: str = "samples",
) -> PolicyPoint:
    """Draw `completions` fresh samples of each prompt from the policy, and measure reward and KL along them.

    Args:
        reference: Reads the same token ids.
        temperature: Of sampling, and of both models in the KL.
        label: What the progress bar of sampling says.

    Raises:
        ConfigError: the temperature is 0, where a KL says nothing; no prompt; one that leaves no room.
        RewardError: the reward fails.
    """
    if temperature <= 0:
        raise ConfigError(
            "A policy without randomness has no KL to speak of.",
            where="temperature",
            got=f"{temperature:g}",
            expected="above 0",
        )
    if not prompts:
        raise ConfigError("There is no prompt to measure a policy on.", where="prompts", expected="at least one")
    settings = Settings(max_new_tokens, temperature=temperature, seed=seed)
    drawn = draw(LocalModel(policy, renderer), prompts, completions, settings, label)
    rewards = reward_of_samples(reward, prompts, drawn)  # the likeliest to fail, so first
    kl = sequence_kl(policy, reference, renderer, prompts, drawn, temperature=temperature)
    return PolicyPoint(
        reward=rewards.mean(axis=1),
        kl=kl.mean(axis=1),
        tokens=np.array([[len(s.ids) for s in group] for group in drawn]).mean(axis=1),
        finished=np.array([[s.finish == "stop" for s in group] for group in drawn]).mean(axis=1),
    )


def draw(
    model: LocalModel, prompts: Sequence[Content], completions: int, settings: Settings, label: str
) -> list[list[LocalCompleted]]:
    """`completions` samples of each prompt, under a progress bar."""
    with progress(label, total=len(prompts), unit="prompts") as bar:
        return model.complete(prompts, completions, settings, on_prompt=lambda *_: bar.advance())


def reward_of_samples(
    reward: Reward, prompts: Sequence[Content], drawn: Sequence[Sequence[Completed]]
) -> Float64[np.ndarray, "prompts completions"]:
    """Scores of samples, as many of each prompt, some prompts in one call; under a progress bar."""
    found = np.empty((len(prompts), len(drawn[0])))
    at_once = max(1, _SCORED // len(drawn[0]))
    with progress("rewards", total=len(prompts), unit="prompts") as bar:
        for start in range(0, len(prompts), at_once):
            part = slice(start, min(start + at_once, len(prompts)))
            asked = [prompt for prompt, group in zip(prompts[part], drawn[part], strict=True) for _ in group]
            scores = reward.score(asked, [s.text for group in drawn[part] for s in group])
            found[part] = scores.reshape(-1, found.shape[1])
            bar.advance(len(scores) // found.shape[1])
    return found


def sequence_kl(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    renderer: Renderer,
    prompts: Sequence[Content],
    drawn: Sequence[Sequence[LocalCompleted]],
    *,
    temperature: float = 1.0,
) -> Float64[np.ndarray, "prompts completions"]:
    """Per sample the exact KL of the next-token distributions, summed along it, in nats (see the module).

    Both models run over a bounded number of tokens at a time, or the samples of one prompt, under a progress bar.
    """
    groups = [
        CompletionGroup(
            renderer.prompt_ids(prompt),
            tuple(Completion(s.ids, np.ones(len(s.ids), dtype=bool)) for s in group),
            Source("samples", number),
        )
        for number, (prompt, group) in enumerate(zip(prompts, drawn, strict=True))
    ]
    device = next(policy.parameters()).device
    found = np.empty((len(groups), len(drawn[0])))
    with _evaluating(policy, reference), progress("KL", total=len(groups), unit="prompts") as bar:
        # Two samples of a prompt show whether it can be shared; each is run by transformers one at a time.
        first = pack([replace(groups[0], completions=groups[0].completions[:2])]).to(device)
        paths: tuple[Path, Path] = choose_path(policy, first).path, choose_path(reference, first).path
        for part in micro_batches(groups, _BATCH_TOKENS):
            batch = pack(part).to(device)
            sums = sequence_kl_sum_of_batch(policy, reference, batch, paths, temperature=temperature)
            found[[group.source.row for group in part]] = sums.cpu().numpy().reshape(len(part), -1)
            bar.advance(len(part))
    return found


@contextmanager
def _evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Dropout off; a policy that is being trained goes on as it was."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)
