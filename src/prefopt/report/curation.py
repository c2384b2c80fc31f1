"""What `prefopt check` found, on one page that opens offline: counts, pictures, and every leak and near duplicate."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefopt.config import CheckConfig
from prefopt.curate.curation import Curation
from prefopt.curate.wording import lines
from prefopt.data.audit import Audit
from prefopt.report.curves import INK, LINES, MUTED, RC, Panel, frame, inline_svg
from prefopt.report.page import environment
from prefopt.run import write_atomically

__all__ = ["write_curation"]

_BINS = 40
_MOST_BARS = 8
_SIZE = (4.25, 2.4)  # inches, as all panels of a report


def write_curation(path: Path, audit: Audit, curation: Curation, config: CheckConfig) -> None:
    """Write the page."""
    counts = [("read", audit.rows), ("kept", audit.kept), ("mended", audit.mended), ("refused", audit.refused)]
    page = (
        environment()
        .get_template("curation.html")
        .render(
            files=config.data,
            against=config.against or (),
            format=audit.format,
            counts=counts,
            reasons=list(audit.reasons.items()),
            usable=curation.rows,
            lines=list(lines(curation)),
            panels=list(_panels(curation)),
            leaks=curation.leaks,
            near=[("repeats", row) for row in curation.duplicates]
            + [("contradicts", row) for row in curation.contradictions],
            conflicts=curation.conflicts,
            reversed=curation.columns.reversed,
        )
    )
    write_atomically(path, page.encode("utf-8", errors="backslashreplace"))


def _panels(curation: Curation) -> Iterator[Panel]:
    if curation.lengths is not None:
        gaps, unit = curation.gaps, curation.lengths.unit
        caption = (
            f"Length of the better completion minus that of the worse one, {unit}, over {len(gaps):,} pairs; the "
            "dotted line is the mean. The outermost bars hold what lies further out than 99% of the pairs."
        )
        low, high = np.percentile(gaps, [0.5, 99.5])
        shown = np.clip(gaps, low, high)
        yield _histogram("Length gap", caption, shown, curation.lengths.gap.value, "pairs", f"{unit}, better - worse")
    for name, numbers in curation.columns.numbers.items():
        if numbers:
            caption = f"Column {name}, {len(numbers):,} numbers; the dotted line is the mean."
            yield _histogram(name, caption, numbers, float(np.mean(numbers)), "rows", name)
    for name, values in curation.columns.origins.items():
        yield _shares(f"Rows by {name}", values)
    for part, scripts in curation.scripts.items():
        if len(scripts) > 1:
            yield _shares(f"Scripts of {part}", dict(scripts.most_common()))


def _drawn(title: str, caption: str, draw: Callable[[Any], None], place: tuple[float, float, float, float]) -> Panel:
    with mpl.rc_context({**RC, "svg.hashsalt": f"prefopt {title}"}):
        figure = Figure(figsize=_SIZE, dpi=72)
        axes = figure.add_axes(place)
        frame(axes)
        draw(axes)
        svg: Markup = inline_svg(figure, f"{title}. {caption}")
    return Panel(title, caption, svg, 1)


def _histogram(title: str, caption: str, values: Any, mean: float, unit: str, label: str) -> Panel:
    numbers = np.asarray(values, np.float64)
    whole = (numbers == np.round(numbers)).all() and np.ptp(numbers) < _BINS  # a bar for each number
    bins = np.arange(numbers.min() - 0.5, numbers.max() + 1) if whole else _BINS
    counts, edges = np.histogram(numbers, bins)

    def draw(axes: Any) -> None:
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=LINES[0], lw=0)
        axes.axvline(mean, color=INK, lw=1.0, ls=(0, (1, 2)))
        axes.set_ylabel(unit, fontsize=10)
        axes.set_xlabel(label, loc="right", labelpad=1, fontsize=10)
        axes.set_ylim(bottom=0)

    return _drawn(title, caption, draw, (0.17, 0.185, 0.785, 0.715))


def _shares(title: str, values: dict[str, int]) -> Panel:
    total = sum(values.values())
    shown = list(values.items())[:_MOST_BARS]
    rest = total - sum(count for _, count in shown)
    if rest:
        shown.append((f"{len(values) - len(shown):,} others", rest))
    names = [name if len(name) <= 18 else f"{name[:17]}\N{HORIZONTAL ELLIPSIS}" for name, _ in shown]

    def draw(axes: Any) -> None:
        places = np.arange(len(shown))[::-1]
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.barh(places, [100 * count / total for _, count in shown], color=LINES[0], height=0.7)
        axes.set_yticks(places, names, fontsize=9)
        axes.set_xlabel("percent", loc="right", labelpad=1, fontsize=10, color=MUTED)

    told = ", ".join(f"{name} {count / total:.1%}" for name, count in shown)
    return _drawn(title, f"Of {total:,}: {told}.", draw, (0.38, 0.185, 0.575, 0.765))
