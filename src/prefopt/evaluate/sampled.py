"""What training bought, by samples and a reward: pairs made from samples, and before against after."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.evaluate.estimate import Estimate
from prefopt.evaluate.policy import draw, reward_of_samples, sequence_kl
from prefopt.model.load import load_model
from prefopt.rewards import Reward
from prefopt.sampling.completions import Completed, Settings
from prefopt.sampling.local import LocalCompleted, LocalModel

__all__ = ["Comparison", "compare", "pair_columns", "pairs_from_samples"]


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


def pairs_from_samples(
    prompts: Sequence[str], drawn: Sequence[Sequence[Completed]], reward: Reward
) -> tuple[list[dict[str, str]], int]:
    """Best against worst sample of each prompt, as rows of a preference file; and how many prompts tied.

    A prompt whose samples all have the same reward teaches nothing and makes no pair.
    """
    rows = []
    for prompt, group, scores in zip(prompts, drawn, reward_of_samples(reward, prompts, drawn), strict=True):
        order = np.argsort(scores, kind="stable").tolist()
        worst, best = order[0], order[-1]
        if scores[worst] < scores[best]:
            rows.append({"prompt": prompt, **pair_columns(group[best], group[worst])})
    return rows, len(prompts) - len(rows)


def pair_columns(chosen: Completed, rejected: Completed) -> dict[str, str]:
    """A pair as a row has it; what broke off at the length limit is marked, so that its end is not trained."""
    row = {"chosen": chosen.text, "rejected": rejected.text}
    for name, sample in (("chosen", chosen), ("rejected", rejected)):
        if sample.finish == "length":
            row[f"{name}_finish"] = "length"
    return row


def compare(
    before: str, after: str, prompts: Sequence[str], reward: Reward, *, completions: int, max_new_tokens: int, seed: int
) -> Comparison:
    """Sample both models on `prompts` and measure reward, win rate and the KL paid.

    Args:
        before: Folder of the starting model, the reference of the KL.
        after: Folder of the trained model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = [load_model(path, dtype=torch.float32, device=device) for path in (before, after)]
    models = [LocalModel.of(each) for each in loaded]
    settings = Settings(max_new_tokens, seed=seed)
    drawn = [
        draw(model, prompts, completions, settings, label)
        for model, label in zip(models, ("samples before", "samples after"), strict=True)
    ]
    old, new = (reward_of_samples(reward, prompts, each) for each in drawn)
    wins = (new[:, :, None] > old[:, None, :]) + 0.5 * (new[:, :, None] == old[:, None, :])
    kl = sequence_kl(loaded[1].model, loaded[0].model, models[1].renderer, prompts, drawn[1])
    return Comparison(
        before=Estimate.of(old.mean(axis=1), seed),
        after=Estimate.of(new.mean(axis=1), seed),
        gain=Estimate.of(new.mean(axis=1) - old.mean(axis=1), seed),
        win_rate=Estimate.of(wins.mean(axis=(1, 2)), seed),
        kl=Estimate.of(kl.mean(axis=1), seed),
        tokens=(_mean_tokens(drawn[0]), _mean_tokens(drawn[1])),
    )


def _mean_tokens(drawn: Sequence[Sequence[LocalCompleted]]) -> float:
    return float(np.mean([len(s.ids) for group in drawn for s in group]))
