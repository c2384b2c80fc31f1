"""Best-of-N: what the best of N samples under one reward is worth under another, for every N from one set of samples.

Of M samples of a prompt, sorted by the choosing reward, the i-th is the best of a subset of N in
C(i-1, N-1) of C(M, N) cases; the mean over all subsets is therefore a weighted mean of the samples'
values. It is unbiased like the best of N fresh samples and varies less. Where samples tie in the
choosing reward, any of those that are best is taken with the same probability.
"""

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from rich.console import Console
from rich.table import Table

from prefopt.config import BestOfConfig
from prefopt.data.audit import Audit
from prefopt.data.prompts import Prompt, prompt_groups
from prefopt.data.read import read_prompts
from prefopt.errors import DataError
from prefopt.evaluate.estimate import Estimate
from prefopt.evaluate.policy import draw, reward_of_samples
from prefopt.model.load import load_model, max_positions
from prefopt.model.logprobs import plain_model
from prefopt.progress import say
from prefopt.records import Content
from prefopt.rewards import open_reward
from prefopt.run import write_atomically
from prefopt.sampling.completions import Settings
from prefopt.sampling.local import LocalModel
from prefopt.setup import device_and_dtype

__all__ = ["BestOf", "BestOfPoint", "best_of_points", "evaluate_best_of", "expected_best", "kl_bound"]


def kl_bound(n: int) -> float:
    """log N - (N - 1) / N: an upper bound, in nats, of KL(best of N || the model sampled from).

    Stiennon et al. 2020 (arXiv 2009.01325, appendix G.3) state it as the KL itself, which it is where
    no sample is likely and none tie; that it is a bound is shown by Beirami et al. 2024 (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def expected_best(
    chosen_by: Float64[np.ndarray, "prompts samples"], valued: Float64[np.ndarray, "prompts samples"], n: int
) -> Float64[np.ndarray, " prompts"]:
    """Mean value of the best of `n` samples by `chosen_by`, over all subsets of `n` (see the module)."""
    samples = chosen_by.shape[1]
    assert 1 <= n <= samples
    weights = np.array([math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)])
    found = np.empty(len(chosen_by))
    for prompt, (scores, values) in enumerate(zip(chosen_by, valued, strict=True)):
        _, tie, counts = np.unique(scores, return_inverse=True, return_counts=True)  # ties, worst first
        shared = np.bincount(np.sort(tie), weights=weights) / counts
        found[prompt] = shared[tie] @ values
    return found


@dataclass(frozen=True)
class BestOfPoint:
    """One N.

    Attributes:
        kl_bound: See `kl_bound`, nats.
        reward: The choosing reward of the best of N.
        true_reward: What it is worth under the true reward.
    """

    n: int
    kl_bound: float
    reward: Float64[np.ndarray, " prompts"]
    true_reward: Float64[np.ndarray, " prompts"]


def best_of_points(
    chosen_by: Float64[np.ndarray, "prompts samples"], valued: Float64[np.ndarray, "prompts samples"], n: Sequence[int]
) -> tuple[BestOfPoint, ...]:
    """Every N, ascending, from the same samples."""
    return tuple(
        BestOfPoint(
            each, kl_bound(each), expected_best(chosen_by, chosen_by, each), expected_best(chosen_by, valued, each)
        )
        for each in sorted(set(n))
    )


@dataclass(frozen=True)
class BestOf:
    """Everything that `prefopt evaluate best-of` found."""

    config: BestOfConfig
    made_of: dict[str, Any]
    points: tuple[BestOfPoint, ...]

    def as_json(self) -> dict[str, Any]:
        """What was asked, what it was made of, and every N with 95% bootstrap intervals over prompts."""
        seed = self.config.seed
        points = [
            {
                "n": p.n,
                "kl_bound": p.kl_bound,
                "reward": vars(Estimate.of(p.reward, seed)),
                "true_reward": vars(Estimate.of(p.true_reward, seed)),
            }
            for p in self.points
        ]
        return {**self.config.model_dump(mode="json", exclude={"n"}), **self.made_of, "points": points}

    def table(self) -> str:
        """The same for people."""
        seed, told = self.config.seed, self.config.true_reward is not None
        table = Table()
        for name in ("N", "reward", *(["true reward"] if told else []), "KL at most, nats"):
            table.add_column(name, justify="right")
        for p in self.points:
            worth = [str(Estimate.of(p.true_reward, seed))] if told else []
            table.add_row(str(p.n), str(Estimate.of(p.reward, seed)), *worth, f"{p.kl_bound:.3f}")
        console = Console(file=io.StringIO(), width=100)
        with console.capture() as text:
            console.print(table)
        return f"{text.get()}Means over {self.made_of['prompts_used']:,} prompts with 95% bootstrap intervals."


def evaluate_best_of(config: BestOfConfig) -> BestOf:
    """Sample each prompt once, work out every N, write `config.out`.

    Raises:
        RewardError: a reward cannot be used or fails.
        DataError: there is no prompt.
    """
    device, dtype = device_and_dtype(config.dtype)
    reward = open_reward(config.reward, device=device, dtype=dtype)
    true_name = config.true_reward or config.reward
    true_reward = reward if true_name == config.reward else open_reward(true_name, device=device, dtype=dtype)
    audit = Audit()
    found = read_prompts(config.prompts, audit=audit)
    _some(found, config, audit)
    loaded = load_model(config.model, dtype=dtype, device=device)
    model = LocalModel.of(loaded)
    prompts = _fitting(config, found, model, audit)
    samples = config.samples or max(config.n)
    settings = Settings(config.max_new_tokens, temperature=config.temperature, seed=config.seed)
    drawn = draw(model, prompts, samples, settings, "samples")
    chosen_by = reward_of_samples(reward, prompts, drawn)
    valued = chosen_by if true_reward is reward else reward_of_samples(true_reward, prompts, drawn)
    made_of = {
        "samples": samples,
        "prompts_used": len(prompts),
        "model_fingerprint": loaded.fingerprint,
        "reward_fingerprint": reward.fingerprint,
        "true_reward_fingerprint": true_reward.fingerprint,
    }
    result = BestOf(config, made_of, best_of_points(chosen_by, valued, config.n))
    write_atomically(config.out, (json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n").encode())
    return result


def _fitting(config: BestOfConfig, found: Sequence[Prompt], model: LocalModel, audit: Audit) -> list[Content]:
    """The prompts that leave room for a sample; others are refused by row."""
    limit = max_positions(plain_model(model.model).config)
    room = sys.maxsize if limit is None else limit - config.max_new_tokens
    fitting = {group.source for group in prompt_groups(found, model.renderer, longest=room, audit=audit)}
    say(f"rows: {audit.summary()}; {len(fitting):,} prompts")
    return _some([prompt for prompt in found if prompt.source in fitting], config, audit)


def _some(found: Sequence[Prompt], config: BestOfConfig, audit: Audit) -> list[Content]:
    if not found:
        raise DataError("No usable row is left.", where=", ".join(config.prompts), got=audit.summary())
    return [prompt.content for prompt in found]
