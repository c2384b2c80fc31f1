"""What was found, in lines that a terminal's table and a report's page share."""

from collections.abc import Iterator
from dataclasses import dataclass

from prefopt.curate.curation import Count, Curation, NearRow
from prefopt.curate.lengths import Interval, LengthGap
from prefopt.curate.near import THRESHOLD
from prefopt.curate.oddities import ODDITIES

__all__ = ["Line", "lines"]

_MOST_VALUES = 5  # of a column; the rest is summed up


@dataclass(frozen=True, slots=True)
class Line:
    """A finding: in how many rows of how many, and what it is. `of` None: there is nothing to count."""

    name: str
    rows: int
    of: int | None
    text: str

    @property
    def share(self) -> str:
        """Percent, or nothing."""
        return f"{self.rows / self.of:.1%}" if self.of else ""


def lines(found: Curation) -> Iterator[Line]:
    """Every finding in its order; what looks good is said, too, where it was looked for."""
    yield Line("near duplicates", len(found.duplicates), found.rows, _near(found.duplicates, "nearly"))
    if found.contradictions:
        text = _near(found.contradictions, "nearly the opposite of")
        yield Line("near contradictions", len(found.contradictions), found.rows, text)
    yield from _leaks(found)
    if found.lengths is not None:
        yield from _lengths(found.lengths)
    for part, count in found.refusals.items():
        yield _counted(f"refusals in {part}, suspected", count, found.completions[part])
    for name, parts in found.oddities.items():
        for part, count in parts.items():
            yield Line(
                f"{name.replace('_', ' ')} in {part}", count.rows, found.rows, f"{ODDITIES[name]}; {count.first}"
            )
    yield from _scripts(found)
    yield from _columns(found)


def _near(rows: list[NearRow], relation: str) -> str:
    if not rows:
        return f"none (Jaccard index of runs of 5 words, {THRESHOLD} and above)"
    first = rows[0]
    return f"{first.source} is {relation} {first.of} ({first.similarity:.2f})"


def _leaks(found: Curation) -> Iterator[Line]:
    if found.evaluation_prompts is None:
        return
    rows = len({leak.source for leak in found.leaks})
    asked = f"of {found.evaluation_prompts:,} evaluation prompts"
    leaked = len({leak.prompt for leak in found.leaks})
    yield Line("leaks", rows, found.rows, f"{leaked:,} {asked}" if rows else f"none {asked}")


def _lengths(gap: LengthGap) -> Iterator[Line]:
    means = f"{gap.better:.1f} against {gap.worse:.1f} {gap.unit}"
    yield Line("length gap", gap.pairs, None, f"better - worse: {_interval(gap.gap)} {gap.unit} ({means})")
    share = gap.longer_is_better
    text = (
        f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}] of the pairs say so; {gap.equal:,} are of equal "
        "length, which counts half"
    )
    yield Line("longer is better", gap.pairs, None, text)


def _interval(interval: Interval) -> str:
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def _counted(name: str, count: Count, of: int) -> Line:
    detail = f", {count.detail!r}" if count.detail else ""
    return Line(name, count.rows, of, f"first: {count.first}{detail}")


def _scripts(found: Curation) -> Iterator[Line]:
    for part, scripts in found.scripts.items():
        if len(scripts) > 1:
            yield Line(f"scripts of {part}", scripts.total(), None, _values(scripts))
    if found.other_script is not None:
        yield _counted("answered in another script", found.other_script, found.rows)


def _columns(found: Curation) -> Iterator[Line]:
    columns = found.columns
    for name, values in columns.origins.items():
        yield Line(f"column {name}", sum(values.values()), None, _values(values))
    for name, scores in columns.scores.items():
        odd = f"; {scores.odd:,} are no number" if scores.odd else ""
        quartiles = ", ".join(f"{value:g}" for value in scores.quartiles)
        text = f"mean {scores.mean:.4g}, sd {scores.sd:.4g}, minimum to maximum by quartiles {quartiles}{odd}"
        yield Line(f"column {name}", scores.rows, None, text)
    if columns.order:
        first_below = f"; first below: {columns.reversed[0]}" if columns.reversed else ""
        text = f"score of chosen above rejected: {columns.order['higher']:,}, equal: {columns.order['equal']:,}"
        yield Line("chosen scored below", columns.order["lower"], columns.order.total(), text + first_below)
    if columns.critiques:
        rule = "a score in the top fifth beside words of blame alone, or in the bottom fifth beside praise alone"
        first_found = f"; first: {found.conflicts[0].source}" if found.conflicts else ""
        yield Line("score against critique", len({c.source for c in found.conflicts}), found.rows, rule + first_found)


def _values(values: dict[str, int]) -> str:
    total, shown = sum(values.values()), list(values.items())[:_MOST_VALUES]
    text = ", ".join(f"{name} {count / total:.1%}" for name, count in shown)
    return text + (f", {len(values) - len(shown):,} others" if len(values) > len(shown) else "")
