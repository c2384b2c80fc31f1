"""An experiment's points as a plot, a table and sentences: reward against KL, every number with its estimator."""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefopt.config.frontier import FrontierConfig
from prefopt.evaluate.frontier import Area, Difference, Frontiers, Interval, Measured, mean_over
from prefopt.evaluate.points import Point
from prefopt.report.curves import GRID, INK, MUTED, RC, frame, inline_svg
from prefopt.run import write_atomically

__all__ = ["FrontierReport"]

# Okabe and Ito's colours, which colour-blind people tell apart; markers differ as well.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_START = "start"
_ON_PAPER = {INK: "#111111", MUTED: "#666666", GRID: "#e3e3e3"}  # in the file; a page has variables for them


@dataclass(frozen=True)
class _Spot:
    """The same checkpoint of all seeds: means over seeds and prompts."""

    method: str
    setting: str
    step: str
    last: bool
    reward: Interval
    kl: Interval
    tokens: float
    seeds: int
    bound: bool


@dataclass(frozen=True)
class FrontierReport:
    """What an experiment found."""

    config: FrontierConfig
    points: Sequence[Point]

    @cached_property
    def methods(self) -> list[str]:
        """In the order of the configuration."""
        return [method.name for method in self.config.methods]

    @cached_property
    def frontiers(self) -> Frontiers:
        """Of every method."""
        found: dict[str, dict[int, Measured]] = {}
        for name in self.methods:
            by_seed = defaultdict(list)
            for point in self.points:
                if point.method == name:
                    by_seed[point.seed].append(point)
            found[name] = {
                seed: Measured(np.stack([p.reward for p in some]), np.stack([p.kl for p in some]))
                for seed, some in by_seed.items()
            }
        starts = {p.seed: p.reward for p in self.points if p.method == _START}
        return Frontiers(found, starts, end=self.config.evaluate.max_kl)

    @cached_property
    def areas(self) -> list[Area]:
        """The largest first."""
        return self.frontiers.areas()

    @cached_property
    def differences(self) -> list[Difference]:
        """Of every two methods, that of the larger area first."""
        return [self.frontiers.difference(a, b) for a, b in combinations([area.method for area in self.areas], 2)]

    @property
    def headline(self) -> str:
        """Whether the method of the largest area is above the others, in a sentence."""
        top = self.areas[0].method
        mine = [d for d in self.differences if d.first == top]
        groups: dict[str, list[str]] = {
            "it is above {}": [d.second for d in mine if d.mean and d.mean.low > 0],
            "not beyond the noise above {}": [d.second for d in mine if d.mean and d.mean.low <= 0 <= d.mean.high],
            "but below {}": [d.second for d in mine if d.mean and d.mean.high < 0],
            "above {} with less KL": [d.second for d in mine if d.mean is None and d.above],
            "with {} it has no range of KL in common": [d.second for d in mine if d.mean is None and not d.above],
        }
        said = [text.format(_joined(names)) for text, names in groups.items() if names]
        more = f"; on average where both have points {', '.join(said)}" if said else ""
        return f"{top} has the largest area under its frontier to KL {self.frontiers.end:.2g}{more}."

    def write(self) -> None:
        """OUT/frontier.md and OUT/frontier.svg."""
        write_atomically(self.config.out / "frontier.svg", self.svg())
        write_atomically(self.config.out / "frontier.md", self.markdown().encode())

    def as_json(self) -> dict[str, Any]:
        """Areas, differences and sentences, and where table, plot and points are."""
        out = self.config.out
        paths = {"points": out / "points.jsonl", "table": out / "frontier.md", "plot": out / "frontier.svg"}
        return {
            **{name: str(path) for name, path in paths.items()},
            "headline": self.headline,
            "areas": [asdict(area) for area in self.areas],
            "differences": [{**asdict(d), "sentence": d.sentence} for d in self.differences],
        }

    def markdown(self) -> str:
        """Areas, what may be said of two methods, the last checkpoint of every setting, and how all was measured."""
        end = self.frontiers.end
        lines = [
            f"# Reward against KL: {self.config.out.name}",
            "",
            self.headline,
            "",
            "![Mean true reward against KL](frontier.svg)",
            "",
            f"| method | seeds | points | area above the start to KL {end:.3g} | best mean reward | at a KL of |",
            "|---|---|---|---|---|---|",
        ]
        for a in self.areas:
            kept = ", its last" if a.reach < end else ""
            lines.append(f"| {_cell(a.method)} | {a.seeds} | {a.points} | {a.area} | {a.best} | {a.reach:.2f}{kept} |")
        lines += ["", *[f"- {difference.sentence}" for difference in self.differences]]
        lines += ["", "| method | setting | seeds | step | mean true reward | KL, nats | tokens |", "|---" * 7 + "|"]
        for spot in (spot for spot in self._spots if spot.last):
            at_most = "at most " if spot.bound else ""
            kl = f"{at_most}{spot.kl.value:.2f}" if spot.bound or not spot.kl.value else str(spot.kl)
            what = f"{_cell(spot.method)} | {_cell(spot.setting)} | {spot.seeds} | {spot.step}"
            lines.append(f"| {what} | {spot.reward} | {kl} | {spot.tokens:.1f} |")
        return "\n".join([*lines, "", self._estimators()]) + "\n"

    def _estimators(self) -> str:
        """How every number was come by."""
        asked, seeds = self.config.evaluate, self.config.seeds
        bounds = sorted({spot.method for spot in self._spots if spot.bound})
        sentences = [
            f"Reward: `{self.config.reward}`, mean over {len(self.points[0].reward)} test prompts x {asked.samples} "
            f"fresh samples of at most {asked.max_new_tokens} tokens at temperature 1, and over "
            f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
            "KL: to the start, the exact KL of the next-token distributions summed along these samples.",
            "A frontier is the best reward at no more than a KL; a method whose last gain is before the range's end "
            "keeps its last value there.",
            "Brackets: 95% intervals, +-1.96 standard errors of a bootstrap over prompts, which methods share, "
            + ("and seeds." if len(seeds) > 1 else "at one seed: the luck of training is not in them."),
            "KL by KL: beyond a band that holds over the whole range at once; behind its last point a method may "
            "still be above another, since it got more with less, but never below.",
        ]
        if bounds:
            sentences.append(
                f"{_joined(bounds)}: mean over all subsets of N samples, at the bound log N - (N-1)/N; its tokens are "
                "those of all samples."
            )
        return " ".join(sentences)

    @cached_property
    def _spots(self) -> list[_Spot]:
        """Every checkpoint, in the order of the configuration, steps ascending; the start first.

        Last checkpoints belong together though their steps may differ by seed, with the rows there are.
        """
        ends: dict[tuple[str, str, int], int] = {}
        for p in self.points:
            ends[p.method, p.setting, p.seed] = max(p.step, ends.get((p.method, p.setting, p.seed), 0))
        groups: dict[tuple[str, str, bool, int], list[Point]] = defaultdict(list)
        for p in self.points:
            last = p.step == ends[p.method, p.setting, p.seed]
            groups[p.method, p.setting, last, 0 if last else p.step].append(p)
        order = [_START, *self.methods]
        found = []
        for (method, setting, last, _), some in groups.items():
            steps = sorted({p.step for p in some})
            step = "" if steps == [0] else str(steps[0]) if len(steps) == 1 else f"{steps[0]}\N{EN DASH}{steps[-1]}"
            reward, kl = (mean_over(np.stack([getattr(p, name) for p in some])) for name in ("reward", "kl"))
            tokens = float(np.mean([p.tokens for p in some]))
            found.append(_Spot(method, setting, step, last, reward, kl, tokens, len(some), some[0].bound))
        return sorted(found, key=lambda spot: order.index(spot.method))

    def svg(self) -> bytes:
        """The plot as a file."""
        out = io.StringIO()
        with mpl.rc_context({**RC, "figure.facecolor": "white", "svg.hashsalt": "prefopt frontier"}):
            FigureCanvasSVG(self._figure()).print_svg(out, metadata={"Date": None})
        text = out.getvalue()
        for stand_in, colour in _ON_PAPER.items():
            text = text.replace(stand_in, colour)
        return text.encode()

    def inline_svg(self) -> Markup:
        """The plot for the inside of a page."""
        with mpl.rc_context({**RC, "svg.hashsalt": "prefopt frontier"}):
            return inline_svg(self._figure(), f"Mean true reward against KL. {self.headline}")

    def _figure(self) -> Figure:
        end = self.frontiers.end
        figure = Figure(figsize=(9.4, 4.8), dpi=72)
        axes = figure.add_axes((0.08, 0.12, 0.64, 0.82))
        frame(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        beyond = 0
        for number, name in enumerate(self.methods):
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            spots = [spot for spot in self._spots if spot.method == name]
            shown = [spot for spot in spots if spot.kl.value <= 1.05 * end]
            beyond += len(spots) - len(shown)
            bound = any(spot.bound for spot in spots)
            axes.errorbar(
                [spot.kl.value for spot in shown],
                [spot.reward.value for spot in shown],
                xerr=[spot.kl.high - spot.kl.value for spot in shown],
                yerr=[spot.reward.high - spot.reward.value for spot in shown],
                fmt=marker,
                color=colour,
                mfc="none" if bound else colour,
                ms=4.5,
                lw=0.6,
                label=f"{name} (KL: a bound)" if bound else name,
            )
            grid, area = np.linspace(0, end, 801), next(a for a in self.areas if a.method == name)
            curve, first = self.frontiers.curve(name, grid), min(spot.kl.value for spot in spots)
            for part, style in ((grid <= area.reach, "--" if bound else "-"), (grid > area.reach, ":")):
                part &= grid >= first
                axes.plot(grid[part], curve[part], color=colour, lw=1.4, ls=style, drawstyle="steps-post", zorder=3)
        (start,) = [spot for spot in self._spots if spot.method == _START]
        axes.axhline(start.reward.value, color=MUTED, lw=1.0, ls=(0, (1, 2)), zorder=1)
        axes.text(end, start.reward.value, "start", color=MUTED, ha="right", va="bottom", fontsize=10)
        axes.set_xlim(-0.02 * end, 1.06 * end)
        more = f"; {beyond} more further right" if beyond else ""
        axes.set_xlabel(f"KL to the start, nats a completion{more}")
        axes.set_ylabel("mean true reward")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=10)
        return figure


def _joined(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
