"""Curves of a run as inline SVG: thin lines are training, bold ones with dots the held-out rows.

Colours are CSS variables of the page, so one drawing serves light, dark and print. Nothing is said
by colour alone: the second of two lines is dashed, and lines are named at their ends.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from prefopt.report.plans import Plan, plans_of

__all__ = ["GRID", "INK", "LINES", "MUTED", "RC", "Panel", "draw_calibration", "draw_panels", "frame", "inline_svg"]

Metrics = Sequence[Mapping[str, Any]]

_MOST_POINTS = 400  # of a training line; longer ones are averaged over neighbouring steps, and the page says so
_MOST_DOTS = 24  # of a held-out line

# Drawn with these stand-ins, which become CSS variables.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
LINES = ("#040404", "#050505")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--rule)",
    LINES[0]: "var(--first)",
    LINES[1]: "var(--second)",
}
RC = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.size": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.unicode_minus": True,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Panel:
    """A curve with its heading and the line that says how to read it.

    `averaged`: how many steps each point of its training lines is the mean of.
    """

    title: str
    caption: str
    svg: Markup
    averaged: int


def draw_panels(metrics: Metrics, recipe: str = "dpo") -> list[Panel]:
    """A panel for everything in `metrics` (lines of metrics.jsonl) that has at least one number.

    Metrics without a plan of their own get a plain panel under their own name.
    """
    names = {name for line in metrics for name, value in line.items() if isinstance(value, int | float)}
    first = next((line["loss"] for line in metrics if line.get("step") == 0 and "loss" in line), math.nan)
    plans = plans_of(names, recipe, first_loss=first)
    return [_panel(plan, metrics, i) for i, plan in enumerate(plans) if names & set(plan.lines)]


def draw_calibration(bins: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Observed against predicted shares, with 95% intervals, as a list of one panel; of no bins none.

    Args:
        bins: `evaluate.preferences.Bin` as JSON.
    """
    if not bins:
        return []
    with mpl.rc_context({**RC, "svg.hashsalt": "prefopt calibration"}):
        figure = Figure(figsize=(4.25, 2.4), dpi=72)
        axes = figure.add_axes((0.15, 0.185, 0.805, 0.715))
        frame(axes)
        axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, lw=1.0, ls=(0, (1, 2)), zorder=1)
        for one in bins:
            axes.plot([one["predicted"]] * 2, [one["observed_low"], one["observed_high"]], color=LINES[0], lw=1.4)
            axes.annotate(
                f"{one['pairs']:,}",
                (one["predicted"], one["observed_high"]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=MUTED,
                fontsize=9,
            )
        axes.plot(*zip(*((b["predicted"], b["observed"]) for b in bins), strict=True), "o", color=LINES[0], ms=5)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(min(0.4, *(b["observed_low"] for b in bins)) - 0.03, 1.1)
        axes.set_xlabel("predicted", loc="right", labelpad=1, fontsize=10)
        told = ", ".join(f"{b['observed']:.0%} where {b['predicted']:.0%} is predicted" for b in bins)
        svg = inline_svg(figure, f"Calibration: right in {told}")
    caption = (
        "How often the better-scored completion is the better one (95% intervals, number of pairs above them) against "
        "how often the scores say so: on the dotted line the model knows how sure to be, below it it is too sure."
    )
    return [Panel("Calibration", caption, svg, 1)]


@dataclass(frozen=True)
class _Line:
    steps: list[float]
    values: list[float]
    last: float
    averaged: int  # steps in a point


def _line(metrics: Metrics, split: str, name: str) -> _Line | None:
    """The finite values of a metric; long training lines are averaged over runs of neighbouring steps."""
    points = sorted(
        (float(line["step"]), float(line[name]))
        for line in metrics
        if line.get("split") == split
        and isinstance(line.get("step"), int)
        and isinstance(line.get(name), int | float)
        and math.isfinite(line[name])
    )
    if not points:
        return None
    size = math.ceil(len(points) / _MOST_POINTS) if split == "train" else 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    steps, values = ([sum(p[k] for p in part) / len(part) for part in parts] for k in (0, 1))
    return _Line(steps, values, points[-1][1], size)


def _panel(plan: Plan, metrics: Metrics, number: int) -> Panel:
    averaged = 1
    with mpl.rc_context({**RC, "svg.hashsalt": f"prefopt {number}"}):
        figure = Figure(figsize=(4.25, 2.4), dpi=72)
        axes = figure.add_axes((0.15, 0.185, 0.625, 0.715))
        frame(axes)
        ends: list[tuple[float, str, str]] = []  # height, text, colour
        for (name, label), colour, style in zip(plan.lines.items(), LINES, ("-", (0, (4, 2))), strict=False):
            train, held_out = _line(metrics, "train", name), _line(metrics, "eval", name)
            if train:
                bold = held_out is None
                axes.plot(train.steps, train.values, color=colour, ls=style, lw=1.4 if bold else 0.9, zorder=2)
                averaged = max(averaged, train.averaged)
                if bold or not label:
                    ends.append((train.last, label or "train", colour))
            if held_out:
                dot = "o" if len(held_out.steps) <= _MOST_DOTS else ""
                axes.plot(held_out.steps, held_out.values, color=colour, ls=style, lw=2.2, marker=dot, ms=4.5, zorder=3)
                ends.append((held_out.last, label or "held-out", colour))
        _scale(axes, plan)
        _name_ends(axes, ends)
        svg = inline_svg(
            figure, f"{plan.title}: " + ", ".join(f"{text} ends at {value:.4g}" for value, text, _ in ends)
        )
    return Panel(plan.title, plan.caption, svg, averaged)


def frame(axes: Any) -> None:
    """Few lines and quiet ones."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", scilimits=(-2, 5), useOffset=False)
    axes.margins(x=0.02, y=0.12)


def _scale(axes: Any, plan: Plan) -> None:
    """Limits, number format and the dotted line."""
    if plan.level:
        height, name = plan.level
        axes.axhline(height, color=MUTED, lw=1.0, ls=(0, (1, 2)), zorder=1)
        if name:
            spot = axes.get_yaxis_transform()
            axes.text(0.995, height, name, transform=spot, ha="right", va="bottom", color=MUTED, fontsize=10)
    if plan.limits:
        low, high = plan.limits
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    elif axes.get_ylim()[1] >= 10_000:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step", loc="right", labelpad=1, fontsize=10)


def _name_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each line's name and last value, right of its end; names that would overlap are moved apart."""
    low, high = axes.get_ylim()
    heights = _apart([(value - low) / (high - low) for value, _, _ in ends], gap=0.28)
    for height, (value, text, colour) in zip(heights, ends, strict=True):
        axes.text(1.03, height, f"{text}\n{_short(value)}", transform=axes.transAxes, va="center", color=colour)


def _short(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved as little as keeps neighbours `gap` apart and the middle where it was."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for below, above in zip(order, order[1:], strict=False):
        placed[above] = max(placed[above], placed[below] + gap)
    drift = (sum(placed) - sum(heights)) / max(1, len(heights))
    return [height - drift for height in placed]


def inline_svg(figure: Figure, description: str) -> Markup:
    """The figure as an `<svg>` element for the inside of a page: no prolog, metadata, ids or URLs to spare."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page's own font
    text = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", text)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    body = text[text.index(">", box.end()) + 1 :]
    body = re.sub(r">\s+<", "><", body.strip())
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box.group(1), escape(description))
    return head + Markup(body)
