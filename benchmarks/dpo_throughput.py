"""Pairs per second and peak memory of DPO training: prefopt, plain padded code, TRL, on the same rows.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/dpo_throughput.py                    # all mixes, float32
    .venv/bin/python benchmarks/dpo_throughput.py --mix 350/40/40 --dtype bfloat16

Every contestant runs in a process of its own (its peak resident memory is its own), on the same
rows, batch and weights, with AdamW. Rates are medians over the timed steps after one warm-up step.
The first step's loss and gradient norm are printed: a speed-up counts only if they agree.
The plain code and `trl tuned` have the reference's log-probabilities given, as prefopt has them
from its cache; `trl default` runs as it comes.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MIXES = ("180/330/270", "350/40/40", "800/200/200")
CONTESTANTS = ("prefopt", "plain padded", "trl tuned", "trl default")
VOCABULARY, EOS, BETA = 32_000, 1, 0.1
Pair = tuple[list[int], list[int], list[int]]


def rows(mix: str, pairs: int) -> list[Pair]:
    """Log-normal lengths (sigma 0.6) around the mix's means; completions end in EOS."""
    rng = np.random.default_rng(0)
    prompt, chosen, rejected = (int(n) for n in mix.split("/"))

    def ids(mean: int) -> list[int]:
        length = max(2, round(mean * float(rng.lognormal(-0.18, 0.6))))
        return [int(i) for i in rng.integers(10, VOCABULARY, length)]

    return [(ids(prompt), [*ids(chosen), EOS], [*ids(rejected), EOS]) for _ in range(pairs)]


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    """Llama-shaped, 6 layers x 288, the same random weights for everybody."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=8192,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    made: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    return made


# --- prefopt: its own step, as `prefopt dpo` runs it ---------------------------------------------


def prefopt(pairs: list[Pair], batch: int, dtype: torch.dtype) -> dict[str, Any]:
    from prefopt.data.group import Completion, CompletionGroup
    from prefopt.data.pack import PackedBatch, micro_batches, pack
    from prefopt.losses import LossTotal, dpo
    from prefopt.model.logprobs import sequence_logprob_sum
    from prefopt.records import Source
    from prefopt.train.optimizer import Masters, make_optimizer
    from prefopt.train.step import train_step

    def side(ids: list[int]) -> Completion:
        return Completion(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))

    groups = [
        CompletionGroup(np.array(p, dtype=np.int32), (side(c), side(r)), Source("rows", i))
        for i, (p, c, r) in enumerate(pairs)
    ]
    policy = model(dtype)
    reference: dict[bytes, float] = {}
    with torch.no_grad():
        for part in micro_batches(groups, 4096):
            keys = [g.sequence_key(k) for g in part for k in (0, 1)]
            reference |= dict(zip(keys, sequence_logprob_sum(policy, pack(part), "shared").tolist(), strict=True))
    masters = Masters(policy.parameters())
    optimizer = make_optimizer("adamw", masters.parameters, lr=1e-6, weight_decay=0.0)

    def loss_of(b: PackedBatch) -> LossTotal:
        sums = sequence_logprob_sum(policy, b, "shared")
        known = torch.tensor([reference[g.sequence_key(k)] for g in b.groups for k in (0, 1)])
        return dpo(
            policy_chosen=sums[0::2],
            policy_rejected=sums[1::2],
            reference_chosen=known[0::2],
            reference_rejected=known[1::2],
            beta=BETA,
        )

    def step(start: int) -> tuple[float, float]:
        result = train_step(
            groups[start : start + batch],
            loss_of,
            lambda _: 1,
            optimizer,
            masters,
            tokens_per_batch=4096,
            max_grad_norm=1e9,
            device=torch.device("cpu"),
        )
        return result.loss, result.grad_norm

    return _timed(step, len(pairs), batch)


# --- plain padded code: what a careful person writes with transformers alone ---------------------


def plain_padded(pairs: list[Pair], batch: int, dtype: torch.dtype) -> dict[str, Any]:
    policy = model(dtype)
    masters = [p if dtype == torch.float32 else p.detach().float().requires_grad_() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, weight_decay=0.0)

    def logprobs(part: list[Pair]) -> torch.Tensor:
        """Chosen rows, then rejected rows, padded to the longest; full logits."""
        sequences = [(p, c) for p, c, _ in part] + [(p, r) for p, _, r in part]
        longest = max(len(p) + len(c) for p, c in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (p, c) in enumerate(sequences):
            ids[i, : len(p) + len(c)] = torch.tensor(p + c)
            mask[i, : len(p) + len(c)] = 1
            scored[i, len(p) : len(p) + len(c)] = 1
        logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        picked = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        total: torch.Tensor = (picked * scored[:, 1:]).sum(1)
        return total

    with torch.no_grad():
        reference = [logprobs([pair]) for pair in pairs]

    def step(start: int) -> tuple[float, float]:
        part = pairs[start : start + batch]
        sums, known = logprobs(part), torch.stack(reference[start : start + batch])
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

    return _timed(step, len(pairs), batch)


def _timed(step: Callable[[int], tuple[float, float]], pairs: int, batch: int) -> dict[str, Any]:
    first, seconds = None, []
    for start in range(0, pairs, batch):
        began = time.perf_counter()
        result = step(start)
        seconds.append(time.perf_counter() - began)
        first = first or result
    assert first is not None
    return {"seconds": seconds, "loss": first[0], "grad_norm": first[1]}


# --- TRL: its DPOTrainer on the same rows, tokenised to the same ids ------------------------------


def trl(pairs: list[Pair], batch: int, dtype: torch.dtype, tuned: bool) -> dict[str, Any]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    # Fixed width, so that no word is part of another: special tokens are matched inside words.
    words = {f"t{i:05}": i for i in range(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="t00000"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=f"t{EOS:05}", pad_token="t00000")

    def text(ids: list[int]) -> str:
        return " ".join(f"t{i:05}" for i in ids)

    # TRL splits prompt from completion by tokens of the concatenated text; EOS is there already.
    data = Dataset.from_list([{"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in pairs])
    seconds: list[float] = []
    logged: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, *_: Any, **now: Any) -> None:
            logged.append(now["logs"])

    options: dict[str, Any] = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if tuned else {}
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(
            output_dir=out,
            beta=BETA,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1e9,
            per_device_train_batch_size=batch,
            max_length=None,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=dtype == torch.bfloat16,
            seed=0,
            **options,
        )
        policy = model(torch.float32)
        reference = None if tuned else model(torch.float32)
        trainer = DPOTrainer(policy, reference, args=config, train_dataset=data, processing_class=tokenizer)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.add_callback(Clock())
        trainer.train()
    return {"seconds": seconds, "loss": float(logged[0]["loss"]), "grad_norm": float(logged[0]["grad_norm"])}


# --- one process a contestant, one table a mix ----------------------------------------------------


def contest(who: str, mix: str, pairs: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Run one contestant in this process."""
    torch.set_num_threads(torch.get_num_threads())
    data = rows(mix, pairs)
    if who == "prefopt":
        result = prefopt(data, batch, dtype)
    elif who == "plain padded":
        result = plain_padded(data, batch, dtype)
    else:
        result = trl(data, batch, dtype, tuned=who == "trl tuned")
    timed = result["seconds"][1:]
    return {
        "loss": result["loss"],
        "grad_norm": result["grad_norm"],
        "pairs_per_second": batch / statistics.median(timed),
        "spread": (max(timed) - min(timed)) / statistics.median(timed),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def baseline_gb() -> float:
    """Resident memory of a process that only imported torch and transformers, for scale."""
    code = "import torch, transformers, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", nargs="+", default=list(MIXES), help="prompt/chosen/rejected mean lengths")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        print(json.dumps(contest(args.contestant, args.mix[0], args.pairs, args.batch, getattr(torch, args.dtype))))
        return
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {version('transformers')}, {args.dtype}, {args.pairs} pairs, batch {args.batch}"
    )
    print(f"imports alone: {baseline_gb():.2f} GB\n")
    everything = {mix: _table(mix, args) for mix in args.mix}
    if args.json:
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


def _table(mix: str, args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"| {mix} | pairs/s | ratio | spread | peak GB | memory | loss | gradient norm |")
    print("|---|---|---|---|---|---|---|---|")
    for who in args.only:
        command = [sys.executable, __file__, "--contestant", who, "--mix", mix, "--dtype", args.dtype]
        command += ["--pairs", str(args.pairs), "--batch", str(args.batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {who} | failed: {done.stderr.strip().splitlines()[-1]} |")
            continue
        r = results[who] = json.loads(done.stdout.strip().splitlines()[-1])
        ours = results.get("prefopt", r)
        print(
            f"| {who} | {r['pairs_per_second']:.2f} | {ours['pairs_per_second'] / r['pairs_per_second']:.2f}x "
            f"| {r['spread']:.0%} | {r['peak_gb']:.2f} | {ours['peak_gb'] / r['peak_gb']:.0%} "
            f"| {r['loss']:.5f} | {r['grad_norm']:.3f} |",
            flush=True,
        )
    print()
    return results


if __name__ == "__main__":
    main()
