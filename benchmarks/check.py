"""How long `prefopt check` takes and how much memory: generated pairs, near duplicates and leaks among them.

    .venv/bin/python benchmarks/check.py
    .venv/bin/python benchmarks/check.py --pairs 10000

Pairs have a prompt of about 80 words and two completions of about 180, out of about 20,000 words drawn with Zipf's
frequencies. One pair in a hundred is an earlier one with a word more, one in a thousand asks a question of the
evaluation set of 1,000 prompts. Printed: what was planted and what was found, seconds, processor
time, and the most memory the process held (its own imports included).
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

EVALUATION = 1000


def text(rng: np.random.Generator, vocabulary: list[str], up_to: np.ndarray, words: int) -> str:
    """Words drawn by their cumulative weights, as a sentence."""
    drawn = np.searchsorted(up_to, rng.random(max(3, int(rng.normal(words, words / 4)))))
    return " ".join(vocabulary[i] for i in drawn.tolist()) + "."


def write_rows(folder: Path, pairs: int) -> dict[str, int]:
    """pairs.jsonl and bench.jsonl; returns how many near duplicates and leaks are among the pairs."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = sorted({"".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)})
    weights = np.cumsum(1 / np.arange(1, len(vocabulary) + 1))
    weights /= weights[-1]
    questions = [text(rng, vocabulary, weights, 40) for _ in range(EVALUATION)]
    (folder / "bench.jsonl").write_text("".join(json.dumps({"turns": [question]}) + "\n" for question in questions))
    planted = {"near_duplicates": 0, "leaks": 0}
    row: dict[str, Any] = {}
    with (folder / "pairs.jsonl").open("w") as file:
        for n in range(pairs):
            earlier = row
            row = {
                "prompt": text(rng, vocabulary, weights, 80),
                "chosen": text(rng, vocabulary, weights, 190),
                "rejected": text(rng, vocabulary, weights, 170),
                "source": ("flan", "sharegpt", "evol")[n % 3],
                "score_chosen": int(rng.integers(5, 11)),
                "score_rejected": int(rng.integers(1, 8)),
            }
            if n % 1000 == 1:
                row["prompt"] = questions[n // 1000 % EVALUATION]
                planted["leaks"] += 1
            if n % 100 == 50:
                row = earlier | {"chosen": earlier["chosen"] + " Indeed."}
                planted["near_duplicates"] += 1
            file.write(json.dumps(row) + "\n")
    return planted


def main() -> None:
    """Write the rows, check them in a process of their own, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60_000)
    pairs: int = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = write_rows(folder, pairs)
        size = (folder / "pairs.jsonl").stat().st_size / 1e6
        command = [sys.executable, "-m", "prefopt", "check", str(folder / "pairs.jsonl"), "--json"]
        command += ["--against", str(folder / "bench.jsonl"), "--write", str(folder / "clean.jsonl")]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - began
    found = json.loads(done.stdout)["curation"]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    megabytes = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {pairs:,} pairs, {size:,.0f} MB")
    print(f"planted: {planted}; found: { ({name: found[name]['rows'] for name in planted}) }")
    print(f"{seconds:.1f} s ({usage.ru_utime + usage.ru_stime:.1f} s of processor time), {megabytes:,.0f} MB")


if __name__ == "__main__":
    main()
