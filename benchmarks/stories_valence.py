"""Does DPO do what it says on a real, tiny model? Story valence before and after, over seeds.

    .venv/bin/python benchmarks/stories_valence.py --data ../shared/data --out runs/stories

SFT on stories, then four continuations of each of several hundred story openings, the best against
the worst by the mean valence of their words in the VADER lexicon, then DPO on those pairs - with
the recipes that `prefopt sft` and `prefopt dpo` run. Fresh continuations of openings never trained
on are measured with intervals over prompts, and the KL paid along the trained model's own samples.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from prefopt.config import DPOConfig, SFTConfig
from prefopt.evaluate.policy import draw
from prefopt.evaluate.sampled import Comparison, compare, pairs_from_samples
from prefopt.model.load import load_model
from prefopt.recipes import dpo, sft
from prefopt.records import Content
from prefopt.rewards import Reward
from prefopt.run import write_atomically
from prefopt.sampling.completions import Settings
from prefopt.sampling.local import LocalModel

NEW_TOKENS = 64
TRAIN, TEST = 500, 200


def valence(lexicon: Path) -> Reward:
    """Mean valence (-4 to 4) of a story's words, opening included, that the lexicon knows; 0 if it knows none."""
    known = {}
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, mean, *_ = line.split("\t")
        known[word.lower()] = float(mean)

    def of(text: str) -> float:
        found = [known[w] for w in re.findall(r"[a-z']+", text.lower()) if w in known]
        return sum(found) / len(found) if found else 0.0

    def score(prompts: Sequence[Content], completions: Sequence[str]) -> list[float]:
        return [of(f"{prompt}{completion}") for prompt, completion in zip(prompts, completions, strict=True)]

    return Reward("valence", str(lexicon), score)


def openings(stories: list[str]) -> list[str]:
    """The first nine words of each story, distinct, in order."""
    return list(dict.fromkeys(" ".join(s.split()[:9]) for s in stories if len(s.split()) > 20))


def one_seed(data: Path, out: Path, seed: int, beta: float, lr: float) -> Comparison:
    """The whole road with one seed."""
    stories = json.loads((data / "tinystories" / "tinystories_1000.json").read_text(encoding="utf-8"))
    reward = valence(data / "vader" / "vader_lexicon.txt")
    texts, pairs = out / "stories.jsonl", out / "pairs.jsonl"
    write_atomically(texts, "".join(json.dumps({"text": s}) + "\n" for s in stories[:300]).encode())
    base = sft.train(
        SFTConfig(model=str(data / "stories260k"), data=(str(texts),), out=out / "sft", lr=5e-4, seed=seed, samples=0)
    )
    prompts = openings(stories)
    loaded = load_model(str(base.path), dtype=torch.float32, device=torch.device("cpu"))
    drawn = draw(LocalModel.of(loaded), prompts[:TRAIN], 4, Settings(NEW_TOKENS, seed=seed), "sampling")
    rows, tied = pairs_from_samples(prompts[:TRAIN], drawn, reward)
    print(f"seed {seed}: {len(rows)} pairs, {tied} openings tied")
    write_atomically(pairs, "".join(json.dumps(row) + "\n" for row in rows).encode())
    aligned = dpo.train(
        DPOConfig(
            model=str(base.path),
            data=(str(pairs),),
            out=out / "dpo",
            beta=beta,
            lr=lr,
            epochs=2,
            batch_pairs=32,
            eval_share=0.1,
            sample_tokens=NEW_TOKENS,
            seed=seed,
        )
    )
    held_out = prompts[TRAIN : TRAIN + TEST]
    return compare(
        str(base.path), str(aligned.path), held_out, reward, completions=4, max_new_tokens=NEW_TOKENS, seed=seed + 100
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k, tinystories and vader")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    results = {seed: one_seed(args.data, args.out / f"seed-{seed}", seed, args.beta, args.lr) for seed in args.seeds}
    print("\n| seed | valence before | after | gain | win rate | KL, nats | tokens before, after |")
    print("|---|---|---|---|---|---|---|")
    for seed, r in results.items():
        tokens = f"{r.tokens[0]:.1f}, {r.tokens[1]:.1f}"
        print(f"| {seed} | {r.before} | {r.after} | {r.gain} | {r.win_rate} | {r.kl} | {tokens} |")


if __name__ == "__main__":
    main()
