"""Every objective on the same real, tiny model and data: reward gained, KL paid, seconds.

    .venv/bin/python benchmarks/losses_table.py --data ../shared/data --out runs/losses
    .venv/bin/python benchmarks/losses_table.py --data ../shared/data --out runs/losses --only dpo ipo kto

SFT on stories, four continuations of each of 500 openings, ranked by the mean valence of their words
in the VADER lexicon: the best against the worst as a pair, the same two as ratings, all that differ as
a ranking; sppo_soft is told sigmoid(difference of valence) as a judge's probability. Every objective
then starts from the same model with its paper's parameters and the same learning rate, epochs and rows
in a step. Four fresh continuations of 200 openings that nobody trained on are measured, with intervals
over openings; KL is the exact sequence KL along the trained model's samples. One seed; learning rates
are not tuned to a loss, so this says what the defaults do, not which loss is best.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefopt.config import DPOConfig, SFTConfig
from prefopt.evaluate.policy import draw, reward_of_samples
from prefopt.evaluate.sampled import compare, pairs_from_samples
from prefopt.model.load import load_model
from prefopt.objectives import OBJECTIVES
from prefopt.recipes import dpo, sft
from prefopt.rewards import Reward
from prefopt.sampling.completions import Completed, Settings
from prefopt.sampling.local import LocalModel
from stories_valence import NEW_TOKENS, TEST, TRAIN, openings, valence

# The papers' betas, where an objective has one without a default.
BETAS = {
    **dict.fromkeys(("dpo", "robust_dpo", "ipo", "ipo_sum", "exo", "apo_zero", "apo_down", "f_dpo", "r_dpo"), 0.1),
    **dict.fromkeys(("ld_dpo", "kto", "plackett_luce"), 0.1),
    **{"hinge": 0.05, "discopop": 0.05, "length_normalized_dpo": 5.0, "sppo_hard": 0.001, "sppo_soft": 0.001},
    **dict.fromkeys(("bco_pair", "bco", "nca", "aot", "aot_unpaired"), 0.01),
}
SEED = 0


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def ratings(pairs: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Each side of each pair by itself."""
    return [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in pairs
        for side in ("chosen", "rejected")
    ]


def rankings(prompts: Sequence[str], drawn: Sequence[Sequence[Completed]], reward: Reward) -> list[dict[str, Any]]:
    """Samples of different reward, the best first."""
    rows = []
    for prompt, group, scores in zip(prompts, drawn, reward_of_samples(reward, prompts, drawn), strict=True):
        by_reward = {score: s.text for score, s in zip(scores.tolist(), group, strict=True)}
        if len(by_reward) > 1:
            best_first = [by_reward[r] for r in sorted(by_reward, reverse=True)]
            rows.append({"prompt": prompt, "completions": best_first})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k, tinystories and vader")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=tuple(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    stories = json.loads((args.data / "tinystories" / "tinystories_1000.json").read_text(encoding="utf-8"))
    reward = valence(args.data / "vader" / "vader_lexicon.txt")
    texts = write(args.out / "stories.jsonl", [{"text": s} for s in stories[:300]])
    base = sft.train(
        SFTConfig(
            model=str(args.data / "stories260k"), data=(texts,), out=args.out / "base", lr=5e-4, seed=SEED, samples=0
        )
    )
    prompts = openings(stories)
    loaded = load_model(str(base.path), dtype=torch.float32, device=torch.device("cpu"))
    drawn = draw(LocalModel.of(loaded), prompts[:TRAIN], 4, Settings(NEW_TOKENS, seed=SEED), "sampling")
    pairs, _ = pairs_from_samples(prompts[:TRAIN], drawn, reward)

    def judged(pair: dict[str, str]) -> float:
        chosen, rejected = reward.score([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        return 1 / (1 + math.exp(rejected - chosen))

    data = {
        "pairs": write(args.out / "pairs.jsonl", pairs),
        "judged": write(args.out / "judged.jsonl", [{**pair, "probability": judged(pair)} for pair in pairs]),
        "ratings": write(args.out / "ratings.jsonl", ratings(pairs)),
        "rankings": write(args.out / "rankings.jsonl", rankings(prompts[:TRAIN], drawn, reward)),
    }
    print("\n| loss | beta | valence gained | win rate | KL, nats | tokens after | training, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in args.only:
        kind = "judged" if name == "sppo_soft" else OBJECTIVES[name].rows
        config = DPOConfig(
            model=str(base.path),
            data=(data[kind],),
            out=args.out / name,
            loss=({"name": name},),
            beta=BETAS.get(name),
            lr=args.lr,
            epochs=2,
            batch_pairs=32,
            eval_share=0.1,
            samples=0,
            seed=SEED,
        )
        began = time.perf_counter()
        aligned = dpo.train(config)
        seconds = time.perf_counter() - began
        r = compare(
            str(base.path),
            str(aligned.path),
            prompts[TRAIN : TRAIN + TEST],
            reward,
            completions=4,
            max_new_tokens=NEW_TOKENS,
            seed=SEED + 100,
        )
        beta = config.terms[0].parameters.get("beta", "-")
        print(f"| {name} | {beta} | {r.gain} | {r.win_rate} | {r.kl} | {r.tokens[1]:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
