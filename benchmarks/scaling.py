"""What more rows cost: seconds and memory of the data path, and the rate of training, at growing sizes.

    .venv/bin/python benchmarks/scaling.py                                # 1,000 10,000 100,000 pairs
    .venv/bin/python benchmarks/scaling.py --sizes 1000 10000 --steps 40

Pairs of random words are written to disk as JSON lines; every size is measured in processes of its
own: the data path as a median of five times up to 10,000 pairs, once above. It is what `prefopt
dpo` does before and between its forward passes: read, audit, tokenise and split; then for every
step of an epoch the order, the groups from disk, the micro-batches and the packed tensors. Memory is
what the process holds after the split, and its peak, above what it held before the first time; 2,000
rows are read to warm up. Training is `prefopt dpo` itself with a tiny model, so that nothing hides
what a row costs besides arithmetic: the median time between steps, after the first five.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

BATCH, BUDGET = 64, 8192
WITHIN = 0.10


def write_model(folder: Path) -> None:
    """One layer of width 16, with the quickstart's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefopt.model.load import save_model
    from prefopt.quickstart.corpus import reviews
    from prefopt.quickstart.seed_model import train_tokenizer

    tokenizer = train_tokenizer(review.text for review in reviews(1000, 0))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(LlamaForCausalLM(config), tokenizer, folder)


def write_pairs(file: Path, rows: int, words: tuple[int, int, int]) -> None:
    """Prompts, chosen and rejected completions of random words; lengths are log-normal around `words`."""
    from prefopt.quickstart.corpus import reviews

    known = sorted({word for review in reviews(200, 0) for word in review.text.split()})
    rng = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(rng.choices(known, k=max(2, round(mean * rng.lognormvariate(-0.18, 0.6)))))

    with file.open("w") as out:
        for _ in range(rows):
            row = {"prompt": text(words[0]), "chosen": " " + text(words[1]), "rejected": " " + text(words[2])}
            out.write(json.dumps(row) + "\n")


def measure_data(folder: Path, rows: int) -> dict[str, Any]:
    """One epoch of the data path, without a model's arithmetic."""
    from prefopt.config import TrainConfig
    from prefopt.data.bins import micro_batches
    from prefopt.data.order import rows_of_step, steps_per_epoch
    from prefopt.data.pack import pack
    from prefopt.setup import load, read_groups, split_rows

    config = TrainConfig(model=str(folder / "model"), data=(str(folder / f"{rows}.jsonl"),), out=folder / "unused")
    loaded, renderer = load(config, torch.float32, torch.device("cpu"))
    warm = config.model_copy(update={"data": (str(folder / "warm.jsonl"),)})
    pack([read_groups(warm, loaded.model, renderer, lambda records: records)[0][0]])
    before, held = _resident(), list[int]()
    read_rates, epoch_rates = list[float](), list[float]()
    for _ in range(5 if rows <= 10_000 else 1):
        began = time.perf_counter()
        groups, audit = read_groups(config, loaded.model, renderer, lambda records: records)
        split = split_rows(config, groups, audit)
        read, tokens = time.perf_counter(), 0
        held.append(_resident() - before)
        for step in range(steps_per_epoch(len(split.train), BATCH)):
            order = rows_of_step(step, rows=len(split.train), batch=BATCH, seed=0)
            for part in micro_batches([split.train[i] for i in order], BUDGET):
                tokens += len(pack(part).input_ids)
        done = time.perf_counter()
        assert tokens == int(split.train.tokens.sum())
        read_rates.append(len(groups) / (read - began))
        epoch_rates.append(len(split.train) / (done - read))
    return {
        "read": statistics.median(read_rates),
        "epoch": statistics.median(epoch_rates),
        "peak": _peak() - before,
        "held": held[0],
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident() -> int:
    """Bytes held now; where the system does not say, the most that were."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else _peak()


def measure_training(folder: Path, rows: int, steps: int) -> dict[str, Any]:
    """Pairs per second of `prefopt dpo`, from when each step began."""
    from prefopt.cli import main

    run = folder / f"run-{rows}"
    began = time.perf_counter()
    code = main(
        [
            *("dpo", "--model", str(folder / "model"), "--data", str(folder / f"{rows}.jsonl"), "--out", str(run)),
            *("--beta", "0.1", "--eval-share", "0", "--samples", "0", "--batch-pairs", str(BATCH)),
            *("--tokens-per-batch", str(BUDGET), "--epochs", "100", "--max-steps", str(steps)),
            *("--save-every", str(steps)),
        ]
    )
    assert code == 0
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    began_at = [datetime.fromisoformat(e["time"]) for e in events if e["event"] == "rows"]
    took = [(after - before).total_seconds() for before, after in pairwise(began_at)][5:]
    return {"train": BATCH / statistics.median(took), "whole": time.perf_counter() - began, "peak": _peak()}


def contest(part: str, folder: Path, rows: int, steps: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--steps", str(steps)]
    command += ["--sizes", str(rows)]
    environment = {**os.environ, "PREFOPT_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{part} with {rows} rows failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="pairs")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps at each size")
    parser.add_argument("--words", default="24/12/12", help="mean words of prompt/chosen/rejected")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--part", choices=("data", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        rows = args.sizes[0]
        data = args.part == "data"
        print(json.dumps(measure_data(args.folder, rows) if data else measure_training(args.folder, rows, args.steps)))
        return
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {version('transformers')}, batch {BATCH} pairs, "
        f"words {args.words}\n"
    )
    words = tuple(int(n) for n in args.words.split("/"))
    with tempfile.TemporaryDirectory(prefix="prefopt-scaling-") as name:
        folder = Path(name)
        write_model(folder / "model")
        for label, rows in (("warm", 2000), *((str(n), n) for n in args.sizes)):
            write_pairs(folder / f"{label}.jsonl", rows, (words[0], words[1], words[2]))
        results = table(folder, args.sizes, args.steps)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def table(folder: Path, sizes: list[int], steps: int) -> dict[int, dict[str, Any]]:
    """Print a line a size, and whether the rates agree."""
    print("| pairs | read + tokenise + split, pairs/s | order + bins + packing, pairs/s | training, pairs/s ", end="")
    print("| data path holds | peak | whole training process |")
    print("|---|---|---|---|---|---|---|")
    results: dict[int, dict[str, Any]] = {}
    for rows in sizes:
        data, train = contest("data", folder, rows, steps), contest("train", folder, rows, steps)
        results[rows] = {**train, "train_peak": train["peak"], **data}
        print(
            f"| {rows:,} | {data['read']:,.0f} | {data['epoch']:,.0f} | {train['train']:,.0f} "
            f"| {data['held'] / 1e6:.1f} MB | {data['peak'] / 1e6:.1f} MB | {train['peak'] / 1e6:,.0f} MB |",
            flush=True,
        )
    print()
    for name, label in (
        ("read", "read + tokenise + split"),
        ("epoch", "order + bins + packing"),
        ("train", "training"),
    ):
        rates = [results[rows][name] for rows in sizes]
        spread = max(rates) / min(rates) - 1
        verdict = "within" if spread <= WITHIN else "NOT within"
        print(f"{label}: slowest to fastest {spread:.1%}, {verdict} {WITHIN:.0%}")
    if len(sizes) > 1:
        few, many = sizes[0], sizes[-1]
        for name in ("held", "peak"):
            grown = (results[many][name] - results[few][name]) / (many - few)
            print(f"{name}: {grown:.0f} bytes a row more from {few:,} to {many:,} pairs")
    return results


if __name__ == "__main__":
    main()
