"""Draws every loss and its pull against the margin, for docs/losses.md.

    .venv/bin/python benchmarks/losses_plot.py
    .venv/bin/python benchmarks/losses_plot.py --only dpo,ipo --out /tmp/plots

One SVG a loss: the loss on the left, on the right its slope with the sign turned, the pull. A pair's
completions have 20 tokens and lie 40 nats below zero under both models; then they are moved apart, the
chosen up by half the margin, the rejected down by half. The drawings depend on nothing but the losses
and matplotlib's version: the same bytes come out again.
"""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

import prefopt.losses
from prefopt.losses import LossTotal

TOKENS, DEPTH = 20, -40.0  # a completion's length, and its log-probability under the reference in nats
POINTS = torch.linspace(-40, 40, 161, dtype=torch.float64)

# Settings to draw with: the paper's, or such as show the curve's features in the range drawn.
SETTINGS: dict[str, Any] = {
    "beta": 0.1,
    "kl": 0.0,
    "reward_shift": 0.0,
    "chosen_wins": 0.8,
    "rejected_wins": 0.2,
    "divergence": "jensen_shannon",
}
OF_ONE_LOSS: dict[str, dict[str, Any]] = {
    "alpha_po": {"beta": 2.5, "gamma": 1.25, "alpha": 0.25},
    "ipo": {"beta": 0.5},
    "ipo_sum": {"beta": 0.025},
    "ld_dpo": {"alpha": 0.5},
    "length_normalized_dpo": {"beta": 2.0},
    "r_dpo": {"alpha": 0.01},
    "simpo": {"beta": 2.5, "gamma": 1.25},
    "unlikelihood": {"alpha": 0.5},
}

LINES: tuple[dict[str, Any], ...] = ({"color": "#1f5fa8"}, {"color": "#c2571a", "linestyle": (0, (4, 2))})
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefopt",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.labelcolor": "#333333",
}


def drawable() -> list[str]:
    """Losses of tensors given by keyword; sums of losses and helpers are not drawn."""
    found = []
    for name in prefopt.losses.__all__:
        value = getattr(prefopt.losses, name)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            by_keyword = all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values())
            if signature.return_annotation is LossTotal and by_keyword:
                found.append(name)
    return found


def settings(name: str) -> dict[str, Any]:
    """The plain numbers the loss must be given.

    Raises:
        SystemExit: it needs one that this program does not know.
    """
    known = {**SETTINGS, **OF_ONE_LOSS.get(name, {})}
    chosen = {}
    for parameter in inspect.signature(getattr(prefopt.losses, name)).parameters.values():
        if _tensor(parameter.name, torch.zeros(()), True) is None and parameter.default is parameter.empty:
            if parameter.name not in known:
                raise SystemExit(f"{name} needs {parameter.name}: add it to SETTINGS or OF_ONE_LOSS in {__file__}")
            chosen[parameter.name] = known[parameter.name]
    return chosen


def _tensor(name: str, margin: Tensor, wanted: bool) -> Tensor | None:
    """The argument of that name for completions `margin` apart, one row; None where it is no tensor."""
    ranked = torch.stack([DEPTH + margin / 2, DEPTH + 0 * margin, DEPTH - margin / 2])
    part = 0.5 if name.endswith(("_head", "_tail")) else 1.0
    tensors = {
        "rewards": (ranked - DEPTH)[None],
        "policy_chosen": part * ranked[:1],
        "policy_rejected": part * ranked[2:],
        "reference_chosen": part * DEPTH * torch.ones_like(ranked[:1]),
        "reference_rejected": part * DEPTH * torch.ones_like(ranked[:1]),
        "logprob_sum": DEPTH + margin[None],
        "policy": DEPTH + margin[None],
        "reference": DEPTH * torch.ones_like(ranked[:1]),
        "desirable": torch.tensor([wanted]),
        "chosen_tokens": torch.tensor([TOKENS]),
        "rejected_tokens": torch.tensor([TOKENS]),
        "token_counts": torch.tensor([TOKENS]),
    }
    return tensors.get(name.removesuffix("_head").removesuffix("_tail"))


def curve(name: str, wanted: bool = True) -> tuple[list[float], list[float]]:
    """The loss at each point, and the pull: how fast it falls as the margin grows."""
    loss: Callable[..., LossTotal] = getattr(prefopt.losses, name)
    values, pulls = [], []
    for point in POINTS:
        margin = point.clone().requires_grad_()
        rows = {n: t for n in inspect.signature(loss).parameters if (t := _tensor(n, margin, wanted)) is not None}
        if name == "plackett_luce":
            rows["policy"] = torch.stack([DEPTH + margin / 2, DEPTH + 0 * margin, DEPTH - margin / 2])[None]
            rows["reference"] = torch.full_like(rows["policy"], DEPTH)
        (value,) = loss(**rows, **settings(name)).losses
        (slope,) = torch.autograd.grad(value, margin)
        values.append(value.item())
        pulls.append(-slope.item())
    return values, pulls


def across(name: str) -> str:
    """What the margin is, on the axis."""
    parameters = inspect.signature(getattr(prefopt.losses, name)).parameters
    if "logprob_sum" in parameters:
        return "nats above a log-probability of -40"
    if name == "reward_ranking":
        return "reward, best - worst of three"
    if name == "plackett_luce":
        return "log-ratio, best - worst of three, nats"
    if "desirable" in parameters:
        return "log-ratio, nats"
    return (
        "log-ratio, chosen - rejected, nats" if any("reference" in p for p in parameters) else "chosen - rejected, nats"
    )


def draw(name: str, file: Path) -> None:
    """One loss: two panels, and a second line where undesirable rows have another loss."""
    kinds = {"desirable": True, "undesirable": False}
    if "desirable" not in inspect.signature(getattr(prefopt.losses, name)).parameters:
        kinds = {"": True}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.1), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2)
        for (label, wanted), line in zip(kinds.items(), LINES, strict=False):
            for panel, values in zip(panels, curve(name, wanted), strict=True):
                panel.plot(POINTS.tolist(), values, label=label, linewidth=1.6, **line)
        for panel, title in zip(panels, ("loss", "pull = -d loss / d margin"), strict=True):
            panel.set_title(title, loc="left", fontsize=9)
            panel.set_xlabel(across(name))
            panel.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
            panel.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        if len(kinds) > 1:
            panels[0].legend(frameon=False)
        told = ", ".join(f"{key} = {value}" for key, value in settings(name).items())
        figure.suptitle(f"{name}({told})", x=0.01, ha="left", fontsize=9, family="monospace")
        figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "losses")
    parser.add_argument("--only", default="", help="names, with commas between them")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(",") if arguments.only else drawable():
        draw(name, arguments.out / f"{name}.svg")
        print(arguments.out / f"{name}.svg")


if __name__ == "__main__":
    main()
