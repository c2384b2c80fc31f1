"""Runs through the command line, and what they leave behind."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefopt.cli import main

TIMING = {
    *("tokens_per_second", "pairs_per_second", "rows_per_second", "prompts_per_second"),
    "peak_memory_bytes",
}


@dataclass
class Done:
    stdout: str
    stderr: str


def prefopt(*arguments: str, cache: Path, expect: int = 0) -> Done:
    """The command line, in this process: what a shell would see of it."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("PREFOPT_CACHE", str(cache))
        code = main(arguments)
    assert code == expect, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefopt", *arguments]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PREFOPT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(arguments: Sequence[str], cache: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*arguments), env=environment(cache), stderr=subprocess.DEVNULL)


def wait_for_step(run: Path, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(m["step"] >= step for m in metrics_so_far(run)):
            return
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.01)
    raise AssertionError("the run never reached the step")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def metrics_so_far(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


def rows_by_step(run: Path) -> dict[int, list[str]]:
    return {e["step"]: e["rows"] for e in events(run, "rows")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "model" / "model.safetensors"))


def close(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], tolerance: float) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=tolerance, abs=tolerance)
            assert other[name] == expected, name
