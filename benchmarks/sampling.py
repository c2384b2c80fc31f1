"""Tokens per second and peak memory of sampling: prefopt against transformers' generate and continuous batching.

    .venv/bin/python benchmarks/sampling.py                                   # 15M, float32, CPU
    .venv/bin/python benchmarks/sampling.py --device cuda --model 0.5B 1.5B   # bfloat16, random weights

Three kinds of work: best of 16 (long prompts, short completions), rollouts as PPO draws them (64 prompts x 4,
lengths that vary) and evaluation (200 prompts x 1). Weights are random, so a fixed share of the vocabulary
stops a completion and lengths are geometric up to the limit. Every contestant runs in a process of its
own, once to warm up and then `--repeats` times; rates are medians, over tokens up to the stop. `greedy` is
the share of completions of 8 prompts that equal, token for token, those of transformers one prompt at a time.
generate gets its prompts by length in batches within prefopt's token budget, padded on the left.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from workload import SHAPES, model

CONTESTANTS = ("prefopt", "generate", "continuous batching")


@dataclass(frozen=True)
class Work:
    """Prompts of a mean length, samples of each, their limit, and the mean length at which they would stop."""

    prompts: int
    prompt_tokens: int
    samples: int
    limit: int
    mean: int


WORKS = {
    "cpu": {
        "best of 16": Work(2, 512, 16, 32, 64),
        "rollouts": Work(64, 64, 4, 64, 24),
        "evaluation": Work(200, 64, 1, 48, 24),
    },
    "cuda": {
        "best of 16": Work(16, 512, 16, 128, 256),
        "rollouts": Work(64, 256, 4, 512, 160),
        "evaluation": Work(200, 256, 1, 512, 160),
    },
}
Draw = Callable[[list[list[int]], int, bool], list[list[int]]]  # prompts, samples, greedy -> completions


def prompts_of(work: Work, vocabulary: int) -> list[list[int]]:
    """Log-normal lengths (sigma 0.3) around the mean."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, work.prompt_tokens * rng.lognormal(-0.045, 0.3, work.prompts)).astype(int)
    return [rng.integers(vocabulary // 2, vocabulary, n).tolist() for n in lengths]


def prefopt(policy: LlamaForCausalLM, work: Work, stops: list[int], budget: int) -> Draw:
    from prefopt.model.sample import sample

    def draw(prompts: list[list[int]], samples: int, greedy: bool) -> list[list[int]]:
        drawn = sample(
            policy,
            [np.array(p, dtype=np.int32) for p in prompts],
            completions=samples,
            max_new_tokens=work.limit,
            temperature=0.0 if greedy else 1.0,
            stop_ids=frozenset(stops),
            seed=0,
            batch_tokens=budget,
        )
        return [one.ids.tolist() for one in drawn]

    return draw


def _config(work: Work, stops: list[int], samples: int, greedy: bool) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=work.limit, num_return_sequences=samples, eos_token_id=stops, pad_token_id=0, **sampling
    )


def generate(policy: LlamaForCausalLM, work: Work, stops: list[int], budget: int) -> Draw:
    def draw(prompts: list[list[int]], samples: int, greedy: bool) -> list[list[int]]:
        waiting, drawn = sorted(prompts, key=len), list[list[int]]()
        while waiting:
            size = max(1, budget // ((len(waiting[-1]) + work.limit) * samples))
            batch, waiting = waiting[:size], waiting[size:]
            longest = max(len(p) for p in batch)
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=policy.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=policy.device)
            out = policy.generate(  # type: ignore[misc]
                ids, attention_mask=mask, generation_config=_config(work, stops, samples, greedy)
            )
            drawn += [cut(row, stops) for row in out[:, longest:].tolist()]
        return drawn

    return draw


def continuous(policy: LlamaForCausalLM, work: Work, stops: list[int], budget: int) -> Draw:
    # Its own choice of a pool is most of the memory there is, which on a CPU takes it half a minute to clear.
    pool: dict[str, Any] = (
        {"num_blocks": budget // 256 + 1, "max_batch_tokens": 2048} if policy.device.type == "cpu" else {}
    )

    def draw(prompts: list[list[int]], samples: int, greedy: bool) -> list[list[int]]:
        out = policy.generate_batch(
            prompts,
            generation_config=_config(work, stops, samples, greedy),
            continuous_batching_config=ContinuousBatchingConfig(**pool),
        )
        return [cut(list(one.generated_tokens), stops) for one in out.values()]

    return draw


def cut(ids: list[int], stops: list[int]) -> list[int]:
    """Up to the first stop."""
    ended = set(stops)
    return next((ids[: n + 1] for n, token in enumerate(ids) if token in ended), ids)


def one_by_one(policy: LlamaForCausalLM, prompts: list[list[int]], work: Work, stops: list[int]) -> list[list[int]]:
    """transformers' greedy completions without any batching."""
    config = _config(work, stops, 1, greedy=True)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=policy.device)
        out = policy.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[misc]
        found.append(out[0, len(prompt) :].tolist())
    return found


def contest(args: argparse.Namespace, who: str, name: str, shape: str) -> dict[str, Any]:
    """Run one contestant in this process."""
    work = WORKS[args.device][name]
    policy = model(shape, torch.float32 if args.device == "cpu" else torch.bfloat16, args.device).eval()
    vocabulary = SHAPES[shape][0]
    prompts = prompts_of(work, vocabulary)
    stops = list(range(vocabulary // work.mean))
    budget = args.budget or (32_768 if args.device == "cpu" else 262_144)
    makers = {"prefopt": prefopt, "generate": generate, "continuous batching": continuous}
    draw = makers[who](policy, work, stops, budget)
    with torch.no_grad():
        draw(prompts, work.samples, False)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rates, lengths = [], list[int]()
        for _ in range(args.repeats):
            began = time.perf_counter()
            drawn = draw(prompts, work.samples, False)
            lengths = [len(ids) for ids in drawn]
            rates.append(sum(lengths) / (time.perf_counter() - began))
        peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else _resident_gb()
        few = sorted(prompts, key=len)[:8]
        truth, greedy = one_by_one(policy, few, work, stops), draw(few, 1, True)
        agreed = sum(ids in truth for ids in greedy) / len(truth)
    return {
        "rate": statistics.median(rates),
        "spread": (max(rates) - min(rates)) / statistics.median(rates),
        "peak_gb": peak,
        "mean_length": float(np.mean(lengths)),
        "greedy": agreed,
    }


def _resident_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", nargs="+", choices=tuple(SHAPES), help="default: 15M on a CPU, 0.5B on CUDA")
    parser.add_argument("--work", nargs="+", choices=tuple(WORKS["cpu"]), default=list(WORKS["cpu"]))
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=int, help="tokens in caches at once; default 32768 on a CPU, 262144 on CUDA")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or ["15M" if args.device == "cpu" else "0.5B"]
    if args.contestant:
        print(json.dumps(contest(args, args.contestant, args.work[0], args.model[0])))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{date.today()}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {version('transformers')}, {'float32' if args.device == 'cpu' else 'bfloat16'}\n"
    )
    for shape in args.model:
        for name in args.work:
            _table(args, shape, name)


def _table(args: argparse.Namespace, shape: str, name: str) -> None:
    work = WORKS[args.device][name]
    print(
        f"| {shape}, {name}: {work.prompts} prompts of {work.prompt_tokens} x {work.samples}, limit {work.limit} "
        "| tokens/s | prefopt is | spread | peak GB | mean length | greedy |"
    )
    print("|---|---|---|---|---|---|---|")
    ours: float | None = None
    for who in args.only:
        command = [sys.executable, __file__, "--contestant", who, "--device", args.device, "--model", shape]
        command += ["--work", name, "--repeats", str(args.repeats)]
        done = subprocess.run(command + (["--budget", str(args.budget)] if args.budget else []), capture_output=True)
        if done.returncode:
            print(f"| {who} | failed: {done.stderr.decode().strip().splitlines()[-1]} |")
            continue
        r = json.loads(done.stdout.decode().strip().splitlines()[-1])
        ours = r["rate"] if ours is None and who == "prefopt" else ours
        ratio = f"{ours / r['rate']:.2f}x" if ours else "-"
        print(
            f"| {who} | {r['rate']:,.0f} | {ratio} | {r['spread']:.0%} | {r['peak_gb']:.2f} "
            f"| {r['mean_length']:.1f} | {r['greedy']:.0%} |",
            flush=True,
        )
    print()


if __name__ == "__main__":
    main()
