"""The whole story on a tiny model: pretrain, SFT, sample, label, DPO, measure - with the recipes users call."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from prefopt.config import DPOConfig, FrontierConfig, SFTConfig
from prefopt.evaluate.experiment import run_experiment
from prefopt.evaluate.policy import draw
from prefopt.evaluate.sampled import Comparison, compare, pairs_from_samples
from prefopt.model.load import load_model
from prefopt.progress import say
from prefopt.quickstart.corpus import openings, reviews
from prefopt.quickstart.seed_model import save_seed_model
from prefopt.recipes import dpo, sft
from prefopt.report.frontier import FrontierReport
from prefopt.report.page import write_report
from prefopt.rewards import Reward, open_reward
from prefopt.run import RunFolder, write_atomically
from prefopt.sampling.completions import Settings
from prefopt.sampling.local import LocalModel

__all__ = ["run_story"]

_TEXTS, _DEMONSTRATIONS = 4000, 600
_PROMPTS, _SAMPLES = 800, 4
_TEST_PROMPTS, _TEST_SAMPLES = 200, 4
_NEW_TOKENS = 48
_FRONTIER_PROMPTS, _FRONTIER_TEST = 200, 100
_OPENINGS = 1000  # of the frontier: its models begin at the SFT model, which knows none of them
_DPO = {"lr": 1e-3, "batch_pairs": 32}
_PPO = {
    **{"lr": 5e-4, "value_lr": 2e-3, "lam": 1.0, "ppo_epochs": 2, "minibatches": 2, "kl_coef": 0.1},
    **{"batch_prompts": 32, "epochs": 4, "save_every": 7, "kl_horizon": 300},
}


def run_story(out: Path, seed: int) -> Path:
    """Make a model that writes film and product reviews prefer praise; returns the report's path.

    `out` gets `seed-model`, the data files and three run folders; `out/dpo/report.html` tells it all.

    Raises:
        RunError: `out` is not empty.
    """
    RunFolder.refuse_taken(out)
    began = time.monotonic()
    say("1/5 a tiny untrained model and a small text to learn from")
    save_seed_model(out / "seed-model", seed)
    texts = reviews(_TEXTS + _DEMONSTRATIONS, seed)
    _write(out / "reviews.jsonl", ({"text": r.text} for r in texts[:_TEXTS]))
    demonstrations = [r.text.partition(". ") for r in texts[_TEXTS:]]
    shown = [{"prompt": p + dot[:1], "completion": dot[1:] + rest} for p, dot, rest in demonstrations if rest]
    _write(out / "demonstrations.jsonl", shown)

    say("2/5 pretraining on the text, then supervised fine-tuning: prompt in, review out")
    base = _sft(out / "seed-model", out / "reviews.jsonl", out / "pretrain", lr=5e-3, epochs=3, seed=seed)
    start = _sft(base.path, out / "demonstrations.jsonl", out / "sft", lr=1e-3, epochs=1, seed=seed)

    say(f"3/5 sampling {_SAMPLES} reviews for each of {_PROMPTS} openings; the truth picks best and worst")
    prompts = openings(_PROMPTS + _TEST_PROMPTS, seed)
    truth = open_reward("prefopt.quickstart.corpus:ground_truth", device=torch.device("cpu"))
    pairs = _make_pairs(start.path, prompts[:_PROMPTS], truth, seed)
    _write(out / "pairs.jsonl", pairs)

    say("4/5 DPO on those pairs")
    aligned = dpo.train(
        DPOConfig(
            model=str(start.path),
            data=(str(out / "pairs.jsonl"),),
            out=out / "dpo",
            beta=0.3,
            lr=1e-3,
            epochs=2,
            batch_pairs=32,
            eval_share=0.1,
            max_length=128,
            sample_tokens=_NEW_TOKENS,
            seed=seed,
        )
    )
    say(f"5/5 {_TEST_SAMPLES} fresh samples for each of {_TEST_PROMPTS} openings never trained on")
    result = compare(
        str(start.path),
        str(aligned.path),
        prompts[_PROMPTS:],
        truth,
        completions=_TEST_SAMPLES,
        max_new_tokens=_NEW_TOKENS,
        seed=seed + 1,
    )
    _write(out / "openings.jsonl", ({"prompt": opening} for opening in openings(_OPENINGS, seed)))
    frontier = _frontier(start.path, out, seed)
    _tell(result, aligned, frontier, time.monotonic() - began)
    return write_report(aligned.path, drawing=frontier.inline_svg())


def _frontier(start: Path, out: Path, seed: int) -> FrontierReport:
    """How much reward a few settings of each method buy for their KL; configs/sentiment/grammar.yaml has them all."""
    say("and a small frontier, reward against KL: a few settings of every method")
    config = FrontierConfig.model_validate(
        {
            "out": out / "frontier",
            "seeds": (seed,),
            "model": str(start),
            "reward": "prefopt.quickstart.corpus:ground_truth",
            "prompts": {"data": str(out / "openings.jsonl"), "train": _FRONTIER_PROMPTS, "test": _FRONTIER_TEST},
            "pairs": {"samples": 4, "max_new_tokens": _NEW_TOKENS},
            "reward_model": {"lr": 1e-3, "epochs": 2},
            "evaluate": {"samples": 4, "max_new_tokens": _NEW_TOKENS, "every": 10},
            "methods": [
                {"name": "DPO", "recipe": "dpo", "settings": _DPO, "sweep": {"beta": [0.1, 0.3, 1.0]}},
                {"name": "PPO", "recipe": "ppo", "reward": "learned", "settings": _PPO, "sweep": {"target_kl": [6.0]}},
                {"name": "PPO-GT", "recipe": "ppo", "reward": "truth", "settings": _PPO, "sweep": {"target_kl": [6.0]}},
                {
                    "name": "Unlikelihood",
                    "recipe": "dpo",
                    "settings": {**_DPO, "loss": "unlikelihood"},
                    "sweep": {"loss_options.alpha": [0.1, 0.5]},
                },
                {"name": "Preferred-FT", "recipe": "sft", "settings": {"lr": 1e-3}},
                {"name": "Best-of-N", "recipe": "best_of_n", "reward": "truth", "n": [4, 16]},
            ],
        }
    )
    report = FrontierReport(config, run_experiment(config))
    report.write()
    return report


def _sft(model: Path, data: Path, out: Path, *, lr: float, epochs: int, seed: int) -> RunFolder:
    return sft.train(
        SFTConfig(
            model=str(model),
            data=(str(data),),
            out=out,
            lr=lr,
            epochs=epochs,
            batch_rows=32,
            max_length=128,
            eval_share=0.05,
            schedule="cosine",
            samples=4,
            sample_tokens=_NEW_TOKENS,
            seed=seed,
        )
    )


def _make_pairs(model: Path, prompts: list[str], truth: Reward, seed: int) -> list[dict[str, str]]:
    loaded = load_model(str(model), dtype=torch.float32, device=torch.device("cpu"))
    drawn = draw(LocalModel.of(loaded), prompts, _SAMPLES, Settings(_NEW_TOKENS, seed=seed), "sampling")
    pairs, tied = pairs_from_samples(prompts, drawn, truth)
    say(f"pairs: {len(pairs)} made, {tied} prompts left out because all their samples have the same reward")
    return pairs


def _tell(result: Comparison, run: RunFolder, frontier: FrontierReport, seconds: float) -> None:
    """The outcome on the screen and on top of the report."""
    rows = [
        ["mean true reward (-1 to 1)", str(result.before), str(result.after)],
        ["mean length, tokens", f"{result.tokens[0]:.1f}", f"{result.tokens[1]:.1f}"],
    ]
    text = (
        f"Against the model it started from, on {_TEST_PROMPTS} openings never trained on, the aligned model wins "
        f"{result.win_rate.mean:.0%} of the comparisons (95% interval {result.win_rate.low:.0%} to "
        f"{result.win_rate.high:.0%}, ties count half) and gains {result.gain} in true reward. It paid a KL of "
        f"{result.kl} nats a review. Intervals are bootstraps over prompts. With other settings and methods, from the "
        f"same start, on other openings: {frontier.headline} (frontier/frontier.md has the numbers; one seed.)"
    )
    outcome = {"title": "Did it work?", "text": text, "rows": rows}
    write_atomically(run.path / "outcome.json", json.dumps(outcome, indent=2).encode())
    say(f"mean true reward: {result.before} before, {result.after} after")
    say(f"win rate {result.win_rate}, KL {result.kl} nats, whole story in {seconds:.0f} s")


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
