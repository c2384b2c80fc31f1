"""A run folder told on one page that opens offline: what was trained on what, what came of it, what to mind.

Everything on the page is text that was escaped or a drawing made here; it needs no script, and its
content policy forbids scripts and every address.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import binomtest

from prefopt.errors import RunError
from prefopt.report.curves import draw_calibration, draw_panels
from prefopt.report.wording import as_clock, as_duration, as_number, as_text, as_value
from prefopt.run import RunFolder, write_atomically

__all__ = ["environment", "write_report"]

_RECIPES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct Preference Optimization",
    "reward": "Reward model",
    "ppo": "Proximal policy optimisation",
}
_HISTORY = {"started", "resumed", "interrupted", "saved", "finished"}


def write_report(run: Path, drawing: Markup | None = None) -> Path:
    """Write RUN/report.html from what the run folder holds, and return its path.

    Only config.yaml must be there; a part of the page without its file is left out.

    Args:
        drawing: An `<svg>` for the outcome.

    Raises:
        RunError: there is no configuration, or a file of the run cannot be read.
    """
    told = _Told.of(run)
    page = environment().get_template("page.html").render(**_context(told), drawing=drawing)
    target = run / "report.html"
    # A model may emit half a surrogate pair, which no file can hold: it is shown as its escape.
    write_atomically(target, page.encode("utf-8", errors="backslashreplace"))
    return target


@dataclass(frozen=True)
class _Told:
    """The files of a run, parsed; empty where there is none."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    audit: dict[str, Any]
    outcome: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> "_Told":
        if not (path / "config.yaml").is_file():
            raise RunError(
                "There is no run to report on.",
                where=str(path / "config.yaml"),
                got="no such file",
                expected="a run folder, as `prefopt sft`, `dpo` and `reward` make",
            )
        run = RunFolder(path)
        return cls(
            path=path,
            config=_parsed(path / "config.yaml", lambda _: run.config_dict),
            manifest=_parsed(path / "manifest.json", lambda _: run.manifest),
            metrics=_parsed_lines(path / "metrics.jsonl", run.metrics),
            events=_parsed_lines(path / "events.jsonl", run.events),
            samples=_parsed_lines(path / "samples.jsonl", lambda: _lines(path / "samples.jsonl")),
            audit=_parsed(path / "audit.json", lambda p: json.loads(p.read_text())),
            outcome=_parsed(path / "outcome.json", lambda p: json.loads(p.read_text())),
        )

    def of_event(self, name: str) -> Iterator[dict[str, Any]]:
        return (event for event in self.events if event.get("event") == name)

    def of_split(self, split: str) -> list[dict[str, Any]]:
        return sorted((m for m in self.metrics if m.get("split") == split), key=lambda m: int(m["step"]))

    @property
    def recipe(self) -> str:
        """The recipe's name, or guessed from what only pairs have."""
        known = self.manifest.get("recipe") or next((e.get("recipe") for e in self.of_event("started")), None)
        return str(known or ("dpo" if "beta" in self.config else "training"))


def _parsed(path: Path, parse: Callable[[Path], Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = parse(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, f"a {type(found).__name__}")
    return found


def _parsed_lines(path: Path, parse: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        found = parse()
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not all(isinstance(line, dict) for line in found):
        raise _damaged(path, "a line that is no object")
    return found


def _damaged(path: Path, got: str) -> RunError:
    return RunError(
        "A file of the run cannot be read.",
        where=str(path),
        got=got,
        expected="what the run wrote there",
        todo="Put the file back, or move it away: the report leaves that part out.",
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    # Only "\n" ends a line: model text may hold U+2028 and its kind, which splitlines() breaks at.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def environment() -> Environment:
    """Templates of this folder, every value escaped and none forgotten."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = as_number
    found.filters["value"] = as_value
    return found


def _context(told: _Told) -> dict[str, Any]:
    return {
        "name": told.path.resolve().name,
        "recipe": _RECIPES.get(told.recipe, told.recipe),
        "model": str(told.config.get("model", "")),
        "sentence": _sentence(told),
        "unfinished": None if any(told.of_event("finished")) else _last_step(told),
        "outcome": told.outcome,
        "scores": _scores(told),
        "warnings": [
            {"step": event.get("step"), "sentence": str(event.get("sentence", ""))} for event in told.of_event("warned")
        ],
        "calibration": draw_calibration(told.outcome.get("calibration") or []),
        "panels": draw_panels(told.metrics, told.recipe),
        "splits": {line.get("split") for line in told.metrics},
        "pairs": any("rewards/rejected" in line for line in told.metrics),
        "samples": [
            {name: as_text(sample.get(name)) for name in ("prompt", "before", "after")} for sample in told.samples
        ],
        "drawn": _drawn(told),
        "rows": _rows(told.audit),
        "facts": _facts(told),
        "files": _files(told.manifest),
        "history": _history(told),
        "config": told.config,
        "versions": told.manifest.get("versions") or {},
    }


# --- what came of it ---------------------------------------------------------------------------


def _measured(told: _Told) -> tuple[list[dict[str, Any]], str]:
    """The lines that say best what the run did: held-out ones if there are any."""
    held_out = told.of_split("eval")
    return (held_out, "held-out") if held_out else (told.of_split("train"), "training")


def _sentence(told: _Told) -> str:
    """The outcome in one sentence."""
    lines, split = _measured(told)
    if not lines:
        return "Nothing has been measured yet."
    first, last = lines[0], lines[-1]
    parts = []
    if "rewards/accuracies" in first and "rewards/accuracies" in last:
        interval = _interval(last)
        parts.append(
            f"{split} accuracy {first['rewards/accuracies']:.2f} \N{RIGHTWARDS ARROW} {last['rewards/accuracies']:.2f}"
            + (f" ({interval})" if interval else "")
        )
    if "reward" in first and "reward" in last:
        parts.append(f"{split} reward {first['reward']:.3f} \N{RIGHTWARDS ARROW} {last['reward']:.3f}")
    if "kl" in last:
        parts.append(f"KL {as_number(last['kl'])} nats from the reference")
    if "loss" in first and "loss" in last:
        named = "loss" if parts else f"{split} loss"
        parts.append(f"{named} {first['loss']:.3f} \N{RIGHTWARDS ARROW} {last['loss']:.3f}")
    text = ", ".join(parts) or "No loss was logged"
    return text[0].upper() + text[1:] + f", after {last['step']:,} steps."


def _interval(line: Mapping[str, Any]) -> str:
    """95% interval of the accuracy: the line's own, or Wilson's where it says of how many pairs or rows it is."""
    if "accuracy/low" in line:
        return f"95% interval {line['accuracy/low']:.2f} to {line['accuracy/high']:.2f}"
    unit = "pairs" if "pairs" in line else "rows"
    pairs = line.get(unit)
    if not isinstance(pairs, int | float) or pairs < 1:
        return ""
    right = round(line["rewards/accuracies"] * pairs)
    interval = binomtest(right, int(pairs)).proportion_ci(0.95, method="wilson")
    return f"95% interval {interval.low:.2f} to {interval.high:.2f}, {int(pairs):,} {unit}"


def _last_step(told: _Told) -> int:
    return max((int(line["step"]) for line in told.metrics), default=0)


_SCORED = {
    "reward": "Reward",
    "loss": "Loss",
    "rewards/accuracies": "Accuracy",
    "rewards/margins": "Reward margin",
    "kl": "KL to the reference, nats",
    "entropy": "Entropy, nats a token",
    "lengths/sampled": "Length of samples, tokens",
    "logps/chosen": "Log-probability of chosen, nats",
    "logps/rejected": "Log-probability of rejected, nats",
    "logps/completion": "Log-probability of a completion, nats",
}


def _scores(told: _Told) -> dict[str, Any]:
    """First and last value of the metrics that tell the story; empty without two measurements."""
    lines, split = _measured(told)
    if len(lines) < 2:
        return {}
    first, last = lines[0], lines[-1]
    rows = [(label, first[name], last[name]) for name, label in _SCORED.items() if name in first and name in last]
    return {"split": split, "first": first["step"], "last": last["step"], "rows": rows}


def _drawn(told: _Told) -> list[dict[str, Any]]:
    """Samples of the last update that has any, as the policy drew them."""
    last = list(told.of_event("samples"))[-1:]
    return [
        {"step": event.get("step"), **one, **{name: as_text(one.get(name)) for name in ("prompt", "completion")}}
        for event in last
        for one in event.get("samples", [])
    ]


# --- what it was made of -----------------------------------------------------------------------


def _rows(audit: Mapping[str, Any]) -> dict[str, Any]:
    """The table of rows: what was read, what became of it, which side of the split it is on."""
    if not audit:
        return {}
    named = {
        "rows": "read",
        "kept": "kept as they stand",
        "mended": "mended and kept",
        "refused": "refused",
        "train": "trained on",
        "held_out": "held out for evaluation",
    }
    counts = [(label, audit[name]) for name, label in named.items() if name in audit]
    reasons = sorted((audit.get("reasons") or {}).items(), key=lambda item: -item[1])
    return {
        "format": str(audit.get("format", "")),
        "counts": counts,
        "total": audit.get("rows", 0),
        "reasons": [(str(reason).replace("_", " "), count) for reason, count in reasons],
    }


def _facts(told: _Told) -> list[tuple[str, str, str]]:
    """(name, value, hash or detail) of what the run is made of and how it went."""
    config, manifest = told.config, told.manifest
    found = [("Model", str(config.get("model", "")), manifest.get("model"))]
    if "reference" in manifest:
        found.append(("Reference", str(config.get("reference") or "the starting model"), manifest["reference"]))
    if "reward" in manifest:
        found.append(("Reward", str(config.get("reward", "")), manifest["reward"]))
    found += [(label, "", manifest.get(key)) for label, key in (("Tokenizer", "tokenizer"), ("Template", "template"))]
    for event in list(told.of_event("path"))[-1:]:
        of_scores = told.recipe == "reward"
        found.append(("Scores", *_path(event, "")) if of_scores else ("Log-probabilities", *_path(event, "nats ")))
    seconds = _seconds(told)
    found.append(("Time taken", as_duration(seconds) if seconds is not None else "", None))
    found += [(label, value, None) for label, value in _rates(told)]
    return [(label, value, str(detail or "")) for label, value, detail in found if value or detail]


def _path(event: Mapping[str, Any], unit: str) -> tuple[str, str]:
    value = f"{event.get('path', '')} path"
    if isinstance(event.get("max_difference"), int | float):
        value += f"; {event['max_difference']:.1e} {unit}a sequence at most from transformers' own on the first batch"
    return value, str(event.get("reason", ""))


def _seconds(told: _Told) -> float | None:
    """From the first event to the last, less the pauses before each time the run was resumed."""
    total, before, known = 0.0, None, set[str]()
    for event in told.events:
        try:
            now = datetime.fromisoformat(str(event.get("time")))
            name = str(event.get("event"))
            # A resumed run looks at its reward and chooses its path again, and then says that it is resumed.
            if before is not None and name not in ("resumed", "reward") and not (name == "path" and name in known):
                total += (now - before).total_seconds()
        except (ValueError, TypeError):  # no time, or one with and one without a zone
            return None
        before = now
        known.add(name)
    return total if before is not None and len(told.events) > 1 else None


def _history(told: _Told) -> list[tuple[str, str]]:
    """(what, when) of a run's turning points; of checkpoints the last one, with how many there were."""
    saved = list(told.of_event("saved"))
    found = []
    for event in told.events:
        name = event.get("event")
        if name not in _HISTORY or (name == "saved" and event is not saved[-1]):
            continue
        what = f"{name} at step {event.get('step', 0):,}"
        if name == "saved" and len(saved) > 1:
            what = f"saved {len(saved)} times, last at step {event.get('step', 0):,}"
        found.append((what, as_clock(event.get("time"))))
    return found


def _rates(told: _Told) -> Iterator[tuple[str, str]]:
    """Throughput (the median step's) and the most memory held."""
    rates = []
    for unit in ("tokens", "pairs", "rows", "prompts"):
        values = [line[f"{unit}_per_second"] for line in told.of_split("train") if f"{unit}_per_second" in line]
        if values:
            rates.append(f"{as_number(median(values))} {unit}")
    if rates:
        yield "Throughput", " or ".join(rates) + " a second (median step)"
    memory = [line["peak_memory_bytes"] for line in told.metrics if "peak_memory_bytes" in line]
    if memory:
        yield (
            "Peak memory",
            f"{as_number(max(memory) / 1e9)} GB" if max(memory) >= 1e9 else f"{max(memory) / 1e6:.0f} MB",
        )


def _files(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, hash) of each data file; the files of a folder one by one."""
    found = []
    for name, content in (manifest.get("data") or {}).items():
        try:
            inside = json.loads(content) if str(content).startswith("{") else None
        except ValueError:
            inside = None
        if isinstance(inside, dict):
            found += [(f"{name}/{file}", f"sha256:{digest}") for file, digest in inside.items()]
        else:
            found.append((str(name), str(content)))
    return found
