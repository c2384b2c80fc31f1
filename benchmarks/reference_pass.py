"""Scoring a data set under the reference: prefopt, plain padded code, TRL's precomputation, on the same rows.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/reference_pass.py
    .venv/bin/python benchmarks/reference_pass.py --device cuda --shape 1.5B --pairs 2000 --tokens-per-batch 32768 \
        --padded-batch 32

Every contestant runs in a process of its own on the same rows and weights, after a warm-up on the
first pairs, and scores the rows five times (`--repeats`); the median counts. `prefopt` is the pass
as `prefopt dpo` runs it, tokens from disk and values into the cache included; `prefopt again` finds
all of them there, as another beta, loss or seed does. The plain code scores both sequences of a pair
whole, padded to the longest of its batch, with full logits: in the order of arrival, and sorted by
length. Tokens are counted alike for everybody, a pair's prompt twice. `mean` is the mean
log-probability of a completion: the rates compare only where it agrees.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from datetime import date
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workload import BETA, MIXES, SHAPES, Pair, groups_of, model, padded_logprobs, rows, words

CONTESTANTS = ("prefopt", "prefopt again", "padded", "padded, sorted", "trl")


def prefopt(pairs: list[Pair], args: argparse.Namespace, *, again: bool) -> Callable[[], float]:
    """The pass over a token store with an empty cache, or with a full one."""
    from prefopt.data.pack import PackedBatch
    from prefopt.data.store import GroupStore
    from prefopt.model.logprobs import sequence_logprob_sum
    from prefopt.model.reference import ReferenceCache, reference_logprobs

    store = GroupStore.write(groups_of(pairs))
    device = torch.device(args.device)
    reference = model(args.shape, getattr(torch, args.dtype), args.device).eval()

    def score(batch: PackedBatch) -> torch.Tensor:
        return sequence_logprob_sum(reference, batch, "shared")

    folder = tempfile.TemporaryDirectory()
    runs = 0

    def run() -> float:
        nonlocal runs
        runs += 1
        cache = ReferenceCache(Path(folder.name), "again" if again else f"run {runs}")
        with redirect_stderr(StringIO()):
            values = reference_logprobs(
                store, cache, score, tokens_per_batch=lambda: args.tokens_per_batch, device=device
            )
        return float(values.double().mean())

    return run


def padded(pairs: list[Pair], args: argparse.Namespace, *, by_length: bool) -> Callable[[], float]:
    """Chosen rows, then rejected rows, padded to the longest of the batch; full logits."""
    reference = model(args.shape, getattr(torch, args.dtype), args.device).eval()
    if by_length:
        pairs = sorted(pairs, key=lambda pair: -len(pair[0]) - max(len(pair[1]), len(pair[2])))

    @torch.no_grad()
    def run() -> float:
        starts = range(0, len(pairs), args.padded_batch)
        return float(
            torch.cat([padded_logprobs(reference, pairs[s : s + args.padded_batch]) for s in starts]).double().mean()
        )

    return run


def trl(pairs: list[Pair], args: argparse.Namespace) -> Callable[[], float]:
    """`precompute_ref_log_probs=True`, timed within the trainer's construction, tokenising left out."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, text = words(SHAPES[args.shape][0])
    data = Dataset.from_list([{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in pairs])

    trainer_class: Any = DPOTrainer
    precompute = trainer_class._precompute_ref_logps

    class Late(trainer_class):  # type: ignore[misc]
        """Keeps the precomputation for when it is asked for."""

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            self.later = (dataset, name, batch_size)
            return dataset

    folder = tempfile.TemporaryDirectory()
    config = DPOConfig(
        output_dir=folder.name,
        beta=BETA,
        per_device_train_batch_size=args.padded_batch,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        max_length=None,
        report_to=[],
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        bf16=args.dtype == "bfloat16",
    )
    reference = model(args.shape, getattr(torch, args.dtype), args.device).eval()
    trainer = Late(reference, None, args=config, train_dataset=data, processing_class=tokenizer)

    def run() -> float:
        dataset, name, batch = trainer.later
        trainer._precompute_model_hash = str(time.perf_counter_ns())  # its cache file is for another model then
        scored = precompute(trainer, dataset, name, batch)
        return float(np.mean([scored["ref_chosen_logps"], scored["ref_rejected_logps"]]))

    return run


def contest(args: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in this process."""
    pairs = rows(args.mix[0], args.pairs, SHAPES[args.shape][0])
    made: Callable[[list[Pair]], Callable[[], float]] = {
        "prefopt": lambda p: prefopt(p, args, again=False),
        "prefopt again": lambda p: prefopt(p, args, again=True),
        "padded": lambda p: padded(p, args, by_length=False),
        "padded, sorted": lambda p: padded(p, args, by_length=True),
        "trl": lambda p: trl(p, args),
    }[args.contestant]
    made(pairs[: args.padded_batch])()
    run = made(pairs)
    if args.contestant == "prefopt again":
        run()
    seconds, mean = [], 0.0
    for _ in range(args.repeats):
        began = time.perf_counter()
        mean = run()
        seconds.append(time.perf_counter() - began)
    on_gpu = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "mean": mean, "peak_gb": peak / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", nargs="+", default=list(MIXES), help="prompt/chosen/rejected means")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="15M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="prefopt's budget")
    parser.add_argument("--padded-batch", type=int, default=4, help="pairs in a batch of the others")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.contestant:
        print(json.dumps(contest(args)))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{date.today()}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{version('transformers')}, {args.shape}, {args.dtype}, {args.pairs} pairs, budget "
        f"{args.tokens_per_batch:,} tokens, padded batches of {args.padded_batch} pairs\n"
    )
    everything = {mix: table(mix, args) for mix in args.mix}
    if args.json:
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


def table(mix: str, args: argparse.Namespace) -> dict[str, Any]:
    """One length mix, one line a contestant."""
    tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in rows(mix, args.pairs, SHAPES[args.shape][0]))
    results: dict[str, Any] = {}
    print(f"| {mix} | seconds | pairs/s | tokens/s | prefopt is | spread | peak GB | mean |")
    print("|---|---|---|---|---|---|---|---|")
    options = ("device", "shape", "dtype", "pairs", "repeats", "tokens_per_batch", "padded_batch")
    for who in args.only:
        command = [sys.executable, __file__, "--contestant", who, "--mix", mix]
        command += [part for name in options for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {who} | failed: {done.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        r = results[who] = json.loads(done.stdout.strip().splitlines()[-1])
        took = r["median"] = statistics.median(r["seconds"])
        ours = results.get("prefopt", r)["median"]
        print(
            f"| {who} | {took:.3f} | {args.pairs / took:.1f} | {tokens / took:,.0f} | {took / ours:.2f}x as fast "
            f"| {(max(r['seconds']) - min(r['seconds'])) / took:.0%} | {r['peak_gb']:.2f} | {r['mean']:.4f} |",
            flush=True,
        )
    print()
    return results


if __name__ == "__main__":
    main()
