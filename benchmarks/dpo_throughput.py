"""Pairs per second and peak memory of DPO training: prefopt, plain padded code, TRL, on the same rows.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/dpo_throughput.py                    # all mixes, float32, two CPU cores
    .venv/bin/python benchmarks/dpo_throughput.py --mix 350/40/40 --dtype bfloat16
    .venv/bin/python benchmarks/dpo_throughput.py --file pairs.jsonl.gz --tokenizer FOLDER
    .venv/bin/python benchmarks/dpo_throughput.py --device cuda --shape 1.5B --dtype bfloat16 --pairs 96 --batch 16

Every contestant runs in a process of its own (its peak memory is its own), on the same rows, batch
and weights, with AdamW and float32 master weights. Rates are medians over the timed steps after one
warm-up step. The first step's loss and gradient norm are printed: a speed-up counts only if they agree.
The plain code and `trl tuned` have the reference's log-probabilities given, as prefopt has them
from its cache; `trl default` runs as it comes. On CUDA `trl tuned` halves its micro-batch until it
fits, without gradient checkpointing if it can; useful FLOPs are set beside the measured matmul rate.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from workload import (
    BETA,
    MIXES,
    SHAPES,
    Pair,
    groups_of,
    matmul_flops,
    model,
    padded_logprobs,
    rows,
    rows_of_file,
    useful_flops,
    words,
)

CONTESTANTS = ("prefopt", "plain padded", "trl tuned", "trl default")


@dataclass(frozen=True)
class Setting:
    """What is the same for all contestants."""

    shape: str
    device: str
    dtype: torch.dtype
    batch: int

    @property
    def vocabulary(self) -> int:
        """Tokens of the shape's vocabulary."""
        return SHAPES[self.shape][0]

    def policy(self, dtype: torch.dtype | None = None) -> Any:
        """The model to train."""
        return model(self.shape, dtype or self.dtype, self.device)


# --- prefopt: its own step, as `prefopt dpo` runs it ---------------------------------------------


def prefopt(pairs: list[Pair], setting: Setting) -> dict[str, Any]:
    from prefopt.data.bins import batches_by_length
    from prefopt.data.group import CompletionGroup
    from prefopt.data.pack import PackedBatch, pack
    from prefopt.losses import LossTotal, dpo
    from prefopt.model.logprobs import sequence_logprob_sum
    from prefopt.model.policy import run_blocks
    from prefopt.train.budget import find_budget, free_bytes, training_state_bytes
    from prefopt.train.optimizer import Masters, make_optimizer
    from prefopt.train.step import train_step

    device = torch.device(setting.device)
    groups = groups_of(pairs)
    policy = setting.policy()
    reference: dict[bytes, float] = {}
    with torch.no_grad():
        for part in batches_by_length(groups, 4096):
            keys = [g.sequence_key(k) for g in part for k in (0, 1)]
            sums = sequence_logprob_sum(policy, pack(part).to(device), "shared")
            reference |= dict(zip(keys, sums.tolist(), strict=True))
    run_blocks(policy, recompute="none", compiled=setting.device == "cuda")

    def loss_of(b: PackedBatch) -> LossTotal:
        sums = sequence_logprob_sum(policy, b, "shared")
        known = torch.tensor([reference[g.sequence_key(k)] for g in b.groups for k in (0, 1)]).to(device)
        return dpo(
            policy_chosen=sums[0::2],
            policy_rejected=sums[1::2],
            reference_chosen=known[0::2],
            reference_rejected=known[1::2],
            beta=BETA,
        )

    def probe(part: Sequence[CompletionGroup]) -> None:
        loss_of(pack(part).to(device)).losses.sum().backward()
        policy.zero_grad(set_to_none=True)

    budget = find_budget(
        probe,
        sorted(groups, key=lambda g: -g.tokens),
        device=device,
        free=free_bytes(device),
        reserved=training_state_bytes(list(policy.parameters())),
    ).tokens
    masters = Masters(policy.parameters())
    optimizer = make_optimizer("adamw", masters.parameters, lr=1e-6, weight_decay=0.0)

    def step(start: int) -> tuple[float, float]:
        result = train_step(
            groups[start : start + setting.batch],
            loss_of,
            lambda _: 1,
            optimizer,
            masters,
            tokens_per_batch=budget,
            max_grad_norm=1e9,
            device=device,
        )
        return result.loss, result.grad_norm

    return _timed(step, len(pairs), setting.batch)


# --- plain padded code: what a careful person writes with transformers alone ---------------------


def plain_padded(pairs: list[Pair], setting: Setting) -> dict[str, Any]:
    policy, dtype = setting.policy(), setting.dtype
    masters = [p if dtype == torch.float32 else p.detach().float().requires_grad_() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, weight_decay=0.0)

    with torch.no_grad():
        reference = [padded_logprobs(policy, [pair]) for pair in pairs]

    def step(start: int) -> tuple[float, float]:
        part = pairs[start : start + setting.batch]
        sums, known = padded_logprobs(policy, part), torch.stack(reference[start : start + setting.batch])
        n = len(part)
        margin = BETA * ((sums[:n] - known[:, 0]) - (sums[n:] - known[:, 1]))
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        loss.backward()
        for master, live in zip(masters, policy.parameters(), strict=True):
            if master is not live:
                assert live.grad is not None
                master.grad, live.grad = live.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, 1e9)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, live in zip(masters, policy.parameters(), strict=True):
                if master is not live:
                    live.copy_(master)
        return float(loss), float(norm)

    return _timed(step, len(pairs), setting.batch)


def _timed(step: Callable[[int], tuple[float, float]], pairs: int, batch: int) -> dict[str, Any]:
    first, seconds = None, []
    for start in range(0, pairs, batch):
        _wait()
        began = time.perf_counter()
        result = step(start)
        _wait()
        seconds.append(time.perf_counter() - began)
        first = first or result
    assert first is not None
    return {"seconds": seconds, "loss": first[0], "grad_norm": first[1]}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- TRL: its DPOTrainer on the same rows, tokenised to the same ids ------------------------------


def trl(pairs: list[Pair], setting: Setting, tuned: bool) -> dict[str, Any]:
    """TRL's trainer; on CUDA the largest micro-batch that fits, recomputing activations only as a last resort."""
    micro, recompute = setting.batch, False
    while True:
        try:
            return _trl(pairs, setting, tuned, micro, recompute)
        except torch.cuda.OutOfMemoryError:
            if micro == 1 and (recompute or not tuned):
                raise
            micro, recompute = (micro // 2, recompute) if micro > 1 else (setting.batch, True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _trl(pairs: list[Pair], setting: Setting, tuned: bool, micro: int, recompute: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer, text = words(setting.vocabulary)
    # TRL splits prompt from completion by tokens of the concatenated text; EOS is there already.
    data = Dataset.from_list([{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in pairs])
    seconds: list[float] = []
    logged: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, *_: Any, **now: Any) -> None:
            logged.append(now["logs"])

    own = {"precompute_ref_log_probs": True, "gradient_checkpointing": recompute}
    options: dict[str, Any] = own if tuned else {}
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(
            output_dir=out,
            beta=BETA,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1e9,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=setting.batch // micro,
            max_length=None,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=setting.device == "cpu",
            bf16=setting.dtype == torch.bfloat16,
            seed=0,
            **options,
        )
        policy = setting.policy(torch.float32)
        reference = None if tuned else setting.policy(torch.float32)
        trainer = DPOTrainer(policy, reference, args=config, train_dataset=data, processing_class=tokenizer)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.add_callback(Clock())
        trainer.train()
    return {"seconds": seconds, "loss": float(logged[0]["loss"]), "grad_norm": float(logged[0]["grad_norm"])}


# --- one process a contestant, one table a mix ----------------------------------------------------


def contest(who: str, pairs: list[Pair], setting: Setting) -> dict[str, Any]:
    """Run one contestant in this process."""
    if who == "prefopt":
        result = prefopt(pairs, setting)
    elif who == "plain padded":
        result = plain_padded(pairs, setting)
    else:
        result = trl(pairs, setting, tuned=who == "trl tuned")
    timed = result["seconds"][1:]
    on_gpu = setting.device == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rate = setting.batch / statistics.median(timed)
    useful = useful_flops(setting.shape, pairs[setting.batch :]) / (len(pairs) - setting.batch) * rate
    return {
        "loss": result["loss"],
        "grad_norm": result["grad_norm"],
        "pairs_per_second": rate,
        "spread": (max(timed) - min(timed)) / statistics.median(timed),
        "peak_gb": (torch.cuda.max_memory_allocated() if on_gpu else resident) / 1e9,
        "useful": useful / matmul_flops(setting.device, setting.dtype),
    }


def baseline_gb() -> float:
    """Resident memory of a process that only imported torch and transformers, for scale."""
    code = (
        "import torch, transformers, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", nargs="+", default=list(MIXES), help="prompt/chosen/rejected mean lengths")
    parser.add_argument("--file", type=Path, help="preference file whose lengths are taken instead")
    parser.add_argument("--tokenizer", type=Path, help="model folder whose tokenizer measures them")
    parser.add_argument("--shape", choices=SHAPES, default="15M")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.file is None) != (args.tokenizer is None):
        parser.error("--file and --tokenizer go together")
    if args.file:
        args.mix = [args.file.name]
    if args.contestant:
        setting = Setting(args.shape, args.device, getattr(torch, args.dtype), args.batch)
        given = (
            rows_of_file(args.file, args.tokenizer, args.pairs, setting.vocabulary)
            if args.file
            else rows(args.mix[0], args.pairs, setting.vocabulary)
        )
        print(json.dumps(contest(args.contestant, given, setting)))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {version('transformers')}, shape {args.shape}, {args.dtype}, {args.pairs} pairs, "
        f"batch {args.batch}"
    )
    print(f"imports alone: {baseline_gb():.2f} GB\n")
    everything = {mix: _table(mix, args) for mix in args.mix}
    if args.json:
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


def _table(mix: str, args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"| {mix} | pairs/s | ratio | spread | peak GB | memory | useful FLOPs | loss | gradient norm |")
    print("|---|---|---|---|---|---|---|---|---|")
    for who in args.only:
        command = [sys.executable, __file__, "--contestant", who, "--mix", mix, "--dtype", args.dtype]
        command += ["--pairs", str(args.pairs), "--batch", str(args.batch), "--shape", args.shape]
        command += ["--device", args.device]
        if args.file:
            command += ["--file", str(args.file), "--tokenizer", str(args.tokenizer)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {who} | failed: {done.stderr.strip().splitlines()[-1]} |")
            continue
        r = results[who] = json.loads(done.stdout.strip().splitlines()[-1])
        ours = results.get("prefopt", r)
        print(
            f"| {who} | {r['pairs_per_second']:.2f} | {ours['pairs_per_second'] / r['pairs_per_second']:.2f}x "
            f"| {r['spread']:.0%} | {r['peak_gb']:.2f} | {ours['peak_gb'] / r['peak_gb']:.0%} | {r['useful']:.0%} "
            f"| {r['loss']:.5f} | {r['grad_norm']:.3f} |",
            flush=True,
        )
    print()
    return results


if __name__ == "__main__":
    main()
