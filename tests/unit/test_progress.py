"""Bars and sentences on stderr, with a clock that the test turns."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from prefopt.progress import Bar, Reporter, progress, say, warn


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A reporter on a string, with its clock."""

    def __init__(self, terminal: bool) -> None:
        self.clock = Clock()
        self._out = io.StringIO()
        console = Console(
            file=self._out, force_terminal=terminal, width=120, color_system=None, _environ={"TERM": "xterm"}
        )
        self.reporter = Reporter(console, self.clock)

    @property
    def text(self) -> str:
        return self._out.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def work(self, bar: Bar, seconds: float, n: int = 1, note: str = "") -> None:
        self.clock.now += seconds
        bar.advance(n, note)


def test_plain_lines_come_after_one_second_and_then_every_five() -> None:
    desk = Desk(terminal=False)
    with desk.reporter.progress("dpo", total=400, unit="steps") as bar:
        for step in range(1, 121):  # two steps a second, for a minute
            desk.work(bar, 0.5, note=f"loss {1 / step:.2f}")
    assert desk.lines[0] == "dpo: 2/400 steps (0%), 2.0 steps/s, 3:19 left, loss 0.50"
    assert desk.lines[1] == "dpo: 12/400 steps (3%), 2.0 steps/s, 3:14 left, loss 0.08"
    assert desk.lines[-1] == "dpo: 120/400 steps in 1:00 (2.0 steps/s), loss 0.01"
    assert len(desk.lines) == 1 + 11 + 1  # after 1 s, at 6, 11, ... 56 s, and the end


def test_work_found_done_does_not_inflate_the_rate() -> None:
    desk = Desk(terminal=False)
    with desk.reporter.progress("dpo", total=300, unit="steps") as bar:
        bar.advance(200)
        desk.work(bar, 4.0)
        assert bar.rate == pytest.approx(0.25)
    assert desk.lines[0] == "dpo: 201/300 steps (67%), 0.2 steps/s, 6:36 left"


def test_the_rate_forgets_what_is_long_ago() -> None:
    desk = Desk(terminal=False)
    with desk.reporter.progress("score", total=1000, unit="rows") as bar:
        for _ in range(10):
            desk.work(bar, 1.0, n=50)
        for _ in range(10):
            desk.work(bar, 5.0, n=5)
        assert bar.rate == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40.0, "40 s per step"), (2.0, "0.5 steps/s"), (0.05, "20 steps/s"), (0.0005, "2,000 steps/s")],
)
def test_speed_reads_well_at_any_scale(seconds: float, words: str) -> None:
    desk = Desk(terminal=False)
    with desk.reporter.progress("dpo", total=10, unit="steps") as bar:
        desk.work(bar, seconds)
        assert bar.pace().startswith(words)


def test_hours_are_written_out() -> None:
    desk = Desk(terminal=False)
    with desk.reporter.progress("dpo", total=4, unit="steps") as bar:
        desk.work(bar, 3661.0)
    assert desk.lines[0] == "dpo: 1/4 steps (25%), 3,661 s per step, 3:03:03 left"


def test_a_stop_says_how_far_it_came() -> None:
    desk = Desk(terminal=False)
    with pytest.raises(SystemExit), desk.reporter.progress("dpo", total=4, unit="steps") as bar:
        desk.work(bar, 33.0)
        raise SystemExit(130)
    assert desk.lines[-1] == "dpo: stopped at 1/4 steps (25%) after 0:33"


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_to_do_is_no_trouble(terminal: bool) -> None:
    desk = Desk(terminal)
    with desk.reporter.progress("score", total=0, unit="rows"):
        pass
    assert "0/0 rows in 0:00" in desk.text


def test_a_short_bar_within_another_is_silent_and_a_long_one_is_not() -> None:
    desk = Desk(terminal=False)
    with desk.reporter.progress("dpo", total=1, unit="steps") as outer:
        with desk.reporter.progress("short", total=1, unit="rows") as inner:
            desk.work(inner, 0.5)
        with desk.reporter.progress("long", total=1, unit="rows") as inner:
            desk.work(inner, 2.0)
        desk.work(outer, 0.1)
    assert desk.lines == ["long: 1/1 rows in 0:02 (0.5 rows/s)", "dpo: 1/1 steps in 0:03 (0.4 steps/s)"]


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    desk = Desk(terminal=True)
    with desk.reporter.progress("dpo", total=4, unit="steps") as bar:
        desk.work(bar, 2.0, note="loss 0.69")
        desk.reporter._drawn.refresh()  # type: ignore[union-attr]
        assert "dpo" in desk.text
        assert "━" in desk.text
        assert "1/4 steps (25%), 0.5 steps/s, 0:06 left, loss 0.69" in desk.text
        desk.work(bar, 6.0, n=3)
    assert "4/4 steps (100%) in 0:08" in desk.text


def test_sentences_stand_above_the_bars_of_a_terminal() -> None:
    desk = Desk(terminal=True)
    with desk.reporter.progress("dpo", total=4, unit="steps"), desk.reporter.progress("kl", total=2, unit="rows"):
        desk.reporter.say("path: shared prefix")
        desk.reporter.warn("half of the rows were cut")
    assert "path: shared prefix\n" in desk.text
    assert "warning: half of the rows were cut\n" in desk.text
    last = desk.text[desk.text.rindex("half of the rows were cut") :]
    assert "dpo" in last
    with desk.reporter.progress("again", total=1, unit="rows") as bar:  # the first bars are gone for good
        bar.advance()
    assert "1/1 rows (100%) in 0:00" in desk.text


@pytest.mark.parametrize("speak", [say, warn])
def test_text_is_printed_as_it_is_on_stderr_alone(
    speak: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "kept [bold]this[/bold] :smile: /a/path 1,000 " + "x" * 200
    speak(text)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.removeprefix("warning: ") == text + "\n"


def test_module_bar_keeps_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("score", total=2, unit="rows") as bar:
        bar.advance(2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("score: 2/2 rows in 0:00")
