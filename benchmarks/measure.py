"""How the contestants of a small benchmark are measured: each in a process of its own, one line of a table each."""

import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

REPEATS = 7
COLUMNS = ("ms", "prefopt is", "spread", "MB above inputs")


def machine(device: str) -> str:
    """Date, machine and versions."""
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return (
        f"{date.today()}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {version('transformers')}"
    )


def measured(run: Callable[[], object], device: str) -> dict[str, Any]:
    """Milliseconds of seven runs after one to warm up, and the most memory they took above what is held already.

    What a run gives back is dropped before the next. Load libraries with a smaller run first.
    """
    before = _held_bytes(device)
    milliseconds = []
    for _ in range(1 + REPEATS):
        began = _now(device)
        run()
        milliseconds.append((_now(device) - began) * 1e3)
    return {"milliseconds": milliseconds[1:], "megabytes": (_peak_bytes(device) - before) / 1e6}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _held_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _peak_bytes(device)  # importing and making the inputs held nothing that they have given back


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def contests(
    program: str, contestants: Sequence[str], options: Sequence[str], *, ours: str, label: str = "", own: Sequence[str]
) -> None:
    """Run `program --contestant WHO OPTIONS` for each, and print its line.

    Args:
        program: Prints as its last line JSON of `measured`'s answer and of `own`.
        ours: The contestant that the others are compared with, where it ran.
        label: What stands before the contestant's name.
        own: Further numbers of the answer to print; one that is missing is shown as -.
    """
    medians: dict[str, float] = {}
    for who in contestants:
        command = [sys.executable, program, "--contestant", who, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
            why = next((line for line in reversed(said) if re.match(r"[\w.]+Error: ", line)), said[-1])
            print(f"| {label}{who} | failed: {why} |", flush=True)
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        took = medians[who] = statistics.median(r["milliseconds"])
        spread = (max(r["milliseconds"]) - min(r["milliseconds"])) / took
        ratio = f"{took / medians[ours]:.2f}x as fast" if ours in medians else "-"
        cells = [f"{r[name]:{'.1e' if isinstance(r[name], float) else ','}}" if name in r else "-" for name in own]
        print(
            f"| {label}{who} | {took:,.1f} | {ratio} | {spread:.0%} | {r['megabytes']:,.0f} | {' | '.join(cells)} |",
            flush=True,
        )


def heading(*cells: str) -> None:
    """The first two lines of a table."""
    print(f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|", flush=True)
