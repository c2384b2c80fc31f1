"""How full micro-batches are: ours beside first-fit-decreasing and packing in order of arrival.

    .venv/bin/python benchmarks/packing.py
    .venv/bin/python benchmarks/packing.py --data ../shared/data/hh-rlhf/helpful-base.test.jsonl.gz --steps 8

One line for each length mix, pairs in a step and token budget, over the same steps for everybody:
micro-batches a step and how many more than the lower bound (tokens / budget, rounded up); fill,
tokens / (micro-batches x capacity), where the capacity is the largest micro-batch of the step, and
where it is the budget; and microseconds a pair. Pairs over the budget, which every packing leaves
on their own, are left out of these figures. `padding` is the share of slots that rows padded to the longest of
the step, the prompt in each of the two, would spend on nothing. Lengths are log-normal (sigma 0.6)
around the mix's means; --data reads a preference file, four characters counting as a token.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np

from prefopt.data.bins import best_fit_bins

MIXES = ("180/330/270", "350/40/40", "800/200/200")
BATCHES = (64, 256)
BUDGETS = (4096, 8192, 16384, 32768)
TARGET = 0.97
Pair = tuple[int, int, int]  # tokens of prompt, chosen, rejected
Bins = list[list[int]]


def in_order(lengths: Sequence[int], budget: int) -> Bins:
    """A new micro-batch wherever the next pair does not fit."""
    bins: Bins = []
    room = 0
    for i, length in enumerate(lengths):
        if not bins or length > room:
            bins.append([])
            room = budget
        bins[-1].append(i)
        room -= length
    return bins


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> Bins:
    """Longest first, each into the first micro-batch with room."""
    bins: Bins = []
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for b, room in enumerate(rooms):
            if lengths[i] <= room:
                bins[b].append(i)
                rooms[b] -= lengths[i]
                break
        else:
            bins.append([i])
            rooms.append(budget - lengths[i])
    return bins


PACKERS: dict[str, Callable[[Sequence[int], int], Bins]] = {
    "prefopt": best_fit_bins,
    "first fit decreasing": first_fit_decreasing,
    "in order": in_order,
}


def drawn(mix: str, pairs: int) -> list[Pair]:
    """Log-normal lengths, as in dpo_throughput.py; completions end in EOS."""
    rng = np.random.default_rng(0)
    means = [int(n) for n in mix.split("/")]
    lengths = np.stack([np.maximum(2, np.round(m * rng.lognormal(-0.18, 0.6, pairs))) for m in means], axis=1)
    return [(int(p), int(c) + 1, int(r) + 1) for p, c, r in lengths]


def read(file: Path) -> list[Pair]:
    """Lengths of a preference file's rows at four characters a token, in a seeded order."""
    from prefopt.data.audit import Audit
    from prefopt.data.read import read_records
    from prefopt.records import Comparison, Content

    def tokens(content: Content) -> int:
        text = content if isinstance(content, str) else "".join(m.content for m in content)
        return 1 + len(text) // 4

    records = [r for r in read_records([str(file)], audit=Audit()) if isinstance(r, Comparison)]
    order = np.random.default_rng(0).permutation(len(records))
    return [(tokens(r.prompt), tokens(r.chosen), tokens(r.rejected)) for r in (records[i] for i in order)]


def padding(steps: list[list[Pair]]) -> float:
    """Share of the slots that hold nothing where every step is one padded batch of two rows a pair."""
    used = slots = 0
    for pairs in steps:
        rows = [p + c for p, c, _ in pairs] + [p + r for p, _, r in pairs]
        used, slots = used + sum(rows), slots + len(rows) * max(rows)
    return 1 - used / slots


def line(name: str, steps: list[list[int]], budget: int) -> tuple[str, float]:
    """One packer's cells, and its fill against the largest micro-batch."""
    count = extra = 0
    full, against_budget, seconds = [], [], []
    for lengths in steps:
        took = []
        for _ in range(5):
            began = time.perf_counter()
            bins = PACKERS[name](lengths, budget)
            took.append(time.perf_counter() - began)
        assert sorted(i for part in bins for i in part) == list(range(len(lengths)))
        loads = [load for part in bins if (load := sum(lengths[i] for i in part)) <= budget]
        count, extra = count + len(loads), extra + len(loads) - -(-sum(loads) // budget)
        full.append(sum(loads) / (len(loads) * max(loads)))
        against_budget.append(sum(loads) / (len(loads) * budget))
        seconds.append(statistics.median(took))
    fill = statistics.mean(full)
    cells = (
        f"{count / len(steps):.1f} | +{extra / len(steps):.1f} | {fill:.1%} | {min(full):.1%} "
        f"| {statistics.mean(against_budget):.1%} | {statistics.mean(seconds) / len(steps[0]) * 1e6:.1f}"
    )
    return cells, fill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", nargs="*", default=list(MIXES), help="prompt/chosen/rejected mean lengths")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="preference files to take lengths from")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="pairs in a step")
    parser.add_argument("--budget", type=int, nargs="+", default=list(BUDGETS), help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=16, help="steps a line is taken over, as far as rows reach")
    args = parser.parse_args()
    print(f"{date.today()}, {platform.processor() or platform.machine()}, Python {sys.version.split()[0]}\n")
    print(
        "| lengths | pairs | padding | budget | packing | micro-batches | over the bound | fill of the largest ", end=""
    )
    print("| its worst step | fill of the budget | us a pair |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    below = []
    sources = {mix: drawn(mix, max(args.batch) * args.steps) for mix in args.mix}
    for label, pairs in (sources | {file.name: read(file) for file in args.data}).items():
        for batch in args.batch:
            starts = range(0, min(len(pairs) // batch, args.steps) * batch, batch)
            if not starts:
                print(f"| {label} | {batch} | too few pairs |")
                continue
            steps = [pairs[start : start + batch] for start in starts]
            for budget in args.budget:
                for name in PACKERS:
                    cells, fill = line(name, [[sum(pair) for pair in step] for step in steps], budget)
                    print(f"| {label} | {batch} | {padding(steps):.0%} | {budget:,} | {name} | {cells} |", flush=True)
                    if name == "prefopt" and fill < TARGET:
                        below.append(f"{label}, {batch} pairs, {budget:,} tokens: {fill:.1%}")
    print(f"\nprefopt below {TARGET:.0%} of the largest: {'; '.join(below) or 'nowhere'}")


if __name__ == "__main__":
    main()
