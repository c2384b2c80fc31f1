"""What training bought, by samples and a reward: pairs made from samples, and before against after.

The unit of resampling is the prompt: intervals are percentile bootstraps over prompts, so several
samples of one prompt never pass for independent evidence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from prefopt.data.bins import micro_batches
from prefopt.data.group import Completion, CompletionGroup
from prefopt.data.pack import pack
from prefopt.model.kl import ReferenceStates, sequence_kl_sum
from prefopt.model.load import LoadedModel, load_model
from prefopt.model.paths import choose_path
from prefopt.progress import progress
from prefopt.records import Source
from prefopt.sampling.completions import Completed, Settings
from prefopt.sampling.local import LocalCompleted, LocalModel

__all__ = ["Comparison", "Estimate", "compare", "draw", "pairs_from_samples"]

Reward = Callable[[str], float]
_RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, per_prompt: Float[np.ndarray, " prompts"], seed: int) -> "Estimate":
        """From one number a prompt."""
        picks = np.random.default_rng(seed).integers(0, len(per_prompt), (_RESAMPLES, len(per_prompt)))
        low, high = np.percentile(per_prompt[picks].mean(axis=1), [2.5, 97.5])
        return cls(float(per_prompt.mean()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """Fresh samples of two models on the same prompts, under one reward.

    Attributes:
        before: Mean reward of the starting model.
        after: Mean reward of the trained model.
        gain: Mean over prompts of the difference.
        win_rate: Share of (before, after) sample pairs of a prompt in which after has more reward, ties half.
        kl: Sequence KL(after || before) in nats, along the trained model's own samples.
        tokens: Mean length of the samples, (before, after).
    """

    before: Estimate
    after: Estimate
    gain: Estimate
    win_rate: Estimate
    kl: Estimate
    tokens: tuple[float, float]


def draw(
    loaded: LoadedModel, prompts: Sequence[str], completions: int, *, max_new_tokens: int, seed: int, label: str
) -> list[list[LocalCompleted]]:
    """`completions` samples of each prompt at temperature 1."""
    with progress(label, total=len(prompts), unit="prompts") as bar:
        return LocalModel.of(loaded).complete(
            prompts, completions, Settings(max_new_tokens, seed=seed), on_prompt=lambda *_: bar.advance()
        )


def pairs_from_samples(
    prompts: Sequence[str], drawn: Sequence[Sequence[Completed]], reward: Reward
) -> tuple[list[dict[str, str]], int]:
    """Best against worst sample of each prompt, as rows of a preference file; and how many prompts tied.

    A prompt whose samples all have the same reward teaches nothing and makes no pair.
    """
    rows = []
    for prompt, group in zip(prompts, drawn, strict=True):
        ranked = sorted((s.text for s in group), key=lambda text: reward(prompt + text))
        if reward(prompt + ranked[0]) < reward(prompt + ranked[-1]):
            rows.append({"prompt": prompt, "chosen": ranked[-1], "rejected": ranked[0]})
    return rows, len(prompts) - len(rows)


def compare(
    before: str, after: str, prompts: Sequence[str], reward: Reward, *, completions: int, max_new_tokens: int, seed: int
) -> Comparison:
    """Sample both models on `prompts` and measure reward, win rate and the KL paid.

    Args:
        before: Folder of the starting model, the reference of the KL.
        after: Folder of the trained model.
        reward: Of prompt and completion together.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [load_model(path, dtype=torch.float32, device=device) for path in (before, after)]
    labels = ("samples before", "samples after")
    drawn = [
        draw(m, prompts, completions, max_new_tokens=max_new_tokens, seed=seed, label=label)
        for m, label in zip(models, labels, strict=True)
    ]
    old, new = (_rewards(prompts, d, reward) for d in drawn)
    wins = (new[:, :, None] > old[:, None, :]) + 0.5 * (new[:, :, None] == old[:, None, :])
    kl = _kl(models[1], models[0], prompts, drawn[1], device)
    return Comparison(
        before=Estimate.of(old.mean(axis=1), seed),
        after=Estimate.of(new.mean(axis=1), seed),
        gain=Estimate.of(new.mean(axis=1) - old.mean(axis=1), seed),
        win_rate=Estimate.of(wins.mean(axis=(1, 2)), seed),
        kl=Estimate.of(kl.mean(axis=1), seed),
        tokens=(_mean_tokens(drawn[0]), _mean_tokens(drawn[1])),
    )


def _rewards(
    prompts: Sequence[str], drawn: Sequence[Sequence[Completed]], reward: Reward
) -> Float[np.ndarray, "prompts completions"]:
    return np.array([[reward(prompt + s.text) for s in group] for prompt, group in zip(prompts, drawn, strict=True)])


def _mean_tokens(drawn: Sequence[Sequence[LocalCompleted]]) -> float:
    return float(np.mean([len(s.ids) for group in drawn for s in group]))


def _kl(
    policy: LoadedModel,
    reference: LoadedModel,
    prompts: Sequence[str],
    drawn: Sequence[Sequence[LocalCompleted]],
    device: torch.device,
) -> Float[np.ndarray, "prompts completions"]:
    """Exact KL of the next-token distributions, summed along each of the policy's samples."""
    renderer = LocalModel.of(policy).renderer
    groups = [
        CompletionGroup(
            renderer.prompt_ids(prompt),
            tuple(Completion(s.ids, np.ones(len(s.ids), dtype=bool)) for s in group),
            Source("samples", number),
        )
        for number, (prompt, group) in enumerate(zip(prompts, drawn, strict=True))
    ]
    batches = [pack(part).to(device) for part in micro_batches(groups, 8192)]
    path = choose_path(policy.model, pack(groups[:1]).to(device)).path
    states = ReferenceStates.of(reference.model, batches, path)
    sums = sequence_kl_sum(policy.model, states, batches, path).cpu().numpy()
    order = [g.source.row for batch in batches for g in batch.groups]
    return sums.reshape(len(prompts), -1)[np.argsort(order)].astype(np.float64)
