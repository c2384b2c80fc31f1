"""What is said while work goes on: plain sentences, and bars with rate and time left.

Everything goes to stderr; stdout belongs to results. On a terminal a bar is drawn and redrawn;
elsewhere a line is printed after the first second and then about every five.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

__all__ = ["Bar", "Reporter", "progress", "say", "warn"]

Clock = Callable[[], float]

_FIRST_LINE = 1.0  # seconds before the first plain line
_LINES_APART = 5.0  # seconds between plain lines
_WINDOW = 30.0  # seconds over which the rate is measured


class Bar:
    """Counts units of work and knows their rate.

    The rate is measured from the first call of `advance` on, so that a resumed run may begin by
    advancing over the work it finds done.
    """

    def __init__(self, label: str, total: int, unit: str, clock: Clock, changed: "Callable[[Bar], None]") -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._clock = clock
        self._changed = changed
        self.began = clock()
        self._seen: deque[tuple[float, int]] = deque()

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done; `note` stands behind the bar until the next one."""
        self.done += n
        self.note = note or self.note
        now = self._clock()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        self._changed(self)

    @property
    def elapsed(self) -> float:
        """Seconds since the bar was made."""
        return self._clock() - self.began

    @property
    def rate(self) -> float:
        """Units per second lately; 0 while unknown."""
        if not self._seen:
            return 0.0
        start, before = self._seen[0]
        end, after = self._seen[-1]
        if after > before and end > start:
            return (after - before) / (end - start)
        return after / (end - self.began) if len(self._seen) == 1 and end > self.began else 0.0

    def counts(self) -> str:
        """`120/400 steps (30%)`."""
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        return f"{self.done:,}/{self.total:,} {self.unit}{share}"

    def pace(self) -> str:
        """`2.1 steps/s, 2:13 left, loss 0.62`: what is known of it."""
        rate, parts = self.rate, list[str]()
        if rate > 0:
            parts.append(_speed(rate, self.unit))
            if self.done < self.total:
                parts.append(f"{_duration((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


class _Pace(ProgressColumn):
    """Counts and pace of the bar a task stands for, worked out anew at every redraw."""

    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        if bar.done >= bar.total:
            return Text(
                f"{bar.counts()} in {_duration(bar.elapsed if task.stop_time is None else task.fields['took'])}"
            )
        return Text(", ".join(part for part in (bar.counts(), bar.pace()) if part))


class Reporter:
    """Says things on one console.

    Args:
        console: Where to; bars are drawn if it is a terminal.
        clock: Seconds, monotonic.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._drawn: Progress | None = None
        self._open = 0

    def say(self, text: str) -> None:
        """One plain line; above the bars if any are drawn."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """One line that stands out."""
        self._print(Text.assemble(("warning: ", "bold yellow"), text))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator[Bar]:
        """A bar over `total` units of work; bars may stand inside one another."""
        drawn = self._console.is_terminal and not self._console.is_dumb_terminal
        with self._draw(label, total, unit) if drawn else self._lines(label, total, unit) as bar:
            yield bar

    @contextmanager
    def _draw(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        outermost = self._drawn is None
        if self._drawn is None:
            self._drawn = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                _Pace(),
                console=self._console,
                redirect_stdout=False,  # results may be printed while a bar is up
                get_time=self._clock,
            )
            self._drawn.start()
        rows = self._drawn
        tasks: list[TaskID] = []
        bar = Bar(label, total, unit, self._clock, lambda b: rows.update(tasks[0], completed=b.done))
        tasks.append(rows.add_task(label, total=total, bar=bar))
        try:
            yield bar
        finally:
            rows.update(tasks[0], took=bar.elapsed)
            rows.stop_task(tasks[0])
            if outermost:
                rows.stop()
                self._drawn = None
            else:
                rows.remove_task(tasks[0])

    @contextmanager
    def _lines(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        inner, said = self._open > 0, list[float]()

        def changed(bar: Bar) -> None:
            now = self._clock()
            due = now - said[-1] >= _LINES_APART if said else now - bar.began >= _FIRST_LINE
            if due and bar.done < bar.total:
                said.append(now)
                self.say(f"{label}: " + ", ".join(part for part in (bar.counts(), bar.pace()) if part))

        bar = Bar(label, total, unit, self._clock, changed)
        self._open += 1
        try:
            yield bar
        except BaseException:
            self.say(f"{label}: stopped at {bar.counts()} after {_duration(bar.elapsed)}")
            raise
        else:
            if not inner or said or bar.elapsed >= _FIRST_LINE:
                speed = f" ({_speed(bar.rate, unit)})" if bar.rate else ""
                note = f", {bar.note}" if bar.note else ""
                self.say(f"{label}: {bar.done:,}/{total:,} {unit} in {_duration(bar.elapsed)}{speed}{note}")
        finally:
            self._open -= 1


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _speed(rate: float, unit: str) -> str:
    if rate < 0.1:
        return f"{1 / rate:,.0f} s per {unit.removesuffix('s')}"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


# `stderr=True` looks sys.stderr up at every print, so redirecting it works.
_stderr = Reporter(Console(stderr=True))
say = _stderr.say
warn = _stderr.warn
progress = _stderr.progress
