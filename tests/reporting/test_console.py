from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from simpletuner.events import Event, Notice, Painted, Progress, RunFinished, RunStarted, Saved, Stepped
from simpletuner.reporting.console import Console, duration


@dataclass
class Log:
    """A console on a stream that is no terminal, and a clock that only we move."""

    stream: io.StringIO = field(default_factory=io.StringIO)
    now_s: float = 0.0

    def console(self, level: str = "info") -> Console:
        return Console(level, stream=self.stream, clock=lambda: self.now_s)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def log() -> Log:
    return Log()


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Tty]:
    def of(columns: int) -> Tty:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        return Tty()

    return of


def screens(stream: Tty) -> list[list[str]]:
    """The lines of each frame of the live display, which begins with "training": without colours and the cursor's ways."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", stream.getvalue())
    frames = [f"training{frame}" for frame in text.split("training")[1:]]
    return [[line.rstrip() for line in frame.splitlines() if line.strip()] for frame in frames]


def stepped(step: int, steps: int = 100) -> Stepped:
    return Stepped(step, steps, 2, 0.51239, 1e-4, 0.1234, 33.333, "2026-11-20T07:00:00+00:00")


def test_a_notice_is_a_line_as_it_was_written_however_long(log: Log) -> None:
    text = "[bold] is no markup, and " + "long " * 60
    log.console()(Notice(text))
    assert log.lines == [text]


def test_a_warning_says_that_it_is_one(log: Log) -> None:
    log.console()(Notice("careful", level="warning"))
    assert log.lines == ["warning: careful"]


EVENTS: list[Event] = [
    Notice("an info"),
    Notice("a warning", level="warning"),
    Painted(Path("a.png"), "cat", "a cat", 1),
    Saved(Path("checkpoint-1"), 1),
    RunStarted(0, 100),
    stepped(10),
]


@pytest.mark.parametrize(("level", "count"), [("debug", 6), ("info", 5), ("warning", 1), ("error", 0)])
def test_the_level_says_how_much_is_told(log: Log, level: str, count: int) -> None:
    console = log.console(level)
    for event in EVENTS:
        console(event)
    assert len(log.lines) == count


def test_a_long_task_speaks_every_ten_seconds_and_at_its_end(log: Log) -> None:
    console = log.console()
    for done in range(61):
        log.now_s = done * 0.5
        console(Progress("encoding cats", done, 60, "pictures"))
    assert log.lines == [
        "encoding cats: 20/60  20 s left, 2 pictures/s",
        "encoding cats: 40/60  10 s left, 2 pictures/s",
        "encoding cats: 60 pictures in 30 s",
    ]


def test_what_an_earlier_run_did_is_no_part_of_the_speed(log: Log) -> None:
    console = log.console()
    console(Progress("encoding cats", 900, 1000, "pictures"))
    log.now_s = 10
    console(Progress("encoding cats", 950, 1000, "pictures"))
    assert log.lines == ["encoding cats: 950/1,000  10 s left, 5 pictures/s"]


def test_a_task_of_the_same_name_is_timed_anew(log: Log) -> None:
    console = log.console()
    for _ in range(2):
        console(Progress("gallery", 0, 4, "pictures"))
        log.now_s += 2
        console(Progress("gallery", 4, 4, "pictures"))
    assert log.lines == ["gallery: 4 pictures in 2.0 s"] * 2


def test_a_task_that_was_over_at_once_needs_no_line(log: Log) -> None:
    console = log.console()
    console(Progress("measuring", 0, 4, "pictures"))
    log.now_s = 0.9
    console(Progress("measuring", 4, 4, "pictures"))
    assert log.lines == []


def test_every_log_point_is_a_line_with_figures_and_from_the_second_on_the_time_left(log: Log) -> None:
    console = log.console()
    console(RunStarted(50, 100))
    log.now_s = 60  # the first gallery
    console(stepped(60))
    log.now_s = 61
    console(stepped(70))
    assert log.lines == [
        "training: 50/100",
        "training: 60/100  33.3 samples/s, loss 0.5124, norm 0.123, lr 1.00e-04, epoch 2",
        "training: 70/100  3.0 s left, 33.3 samples/s, loss 0.5124, norm 0.123, lr 1.00e-04, epoch 2",
    ]


def test_a_terminal_shows_task_count_and_time_left_however_narrow(terminal: Callable[[int], Tty], log: Log) -> None:
    stream = terminal(50)
    with Console(stream=stream, clock=lambda: log.now_s) as console:
        console(RunStarted(0, 100))
        console(stepped(10))
        log.now_s = 1
        console(stepped(20))
        console(RunFinished(20))
    shown = stream.getvalue()
    assert "training" in shown
    assert "20/100" in shown
    assert "8.0 s left" in shown


def told_fully(step: int) -> Stepped:
    memory = {"peak_memory_gib": 14.26, "peak_memory_share": 0.594}
    return replace(stepped(step), extra=memory, upcoming={"gallery": 90, "checkpoint": 40}, steps_per_s=8.3333)


def test_a_log_s_line_has_speed_in_steps_and_memory_where_they_are_known_but_not_what_comes_next(log: Log) -> None:
    console = log.console()
    console(told_fully(10))
    figures = "loss 0.5124, norm 0.123, lr 1.00e-04, epoch 2, memory 14.3 GiB at peak (59%)"
    assert log.lines == [f"training: 10/100  8.33 it/s, 33.3 samples/s, {figures}"]


def test_a_terminal_shows_figures_and_what_comes_next_the_nearest_first(terminal: Callable[[int], Tty], log: Log) -> None:
    stream = terminal(100)
    with Console(stream=stream, clock=lambda: log.now_s) as console:
        console(RunStarted(0, 100))
        console(stepped(10))
        log.now_s = 1
        console(told_fully(20))
        console(RunFinished(20))
    last = screens(stream)[-1]
    assert last[0].startswith("training ━")
    assert last[0].endswith(" 20/100 8.0 s left, 8.33 it/s, 33.3 samples/s")
    assert last[1:3] == [
        "  loss 0.5124, norm 0.123, lr 1.00e-04, epoch 2, memory 14.3 GiB at peak (59%)",
        "  next: checkpoint in 40 steps, gallery in 90",
    ]


def test_the_display_of_a_narrow_terminal_keeps_its_height(terminal: Callable[[int], Tty], log: Log) -> None:
    stream = terminal(40)
    with Console(stream=stream, clock=lambda: log.now_s) as console:
        console(RunStarted(0, 100))
        console(told_fully(10))
        console(RunFinished(10))
    assert len(screens(stream)[-1]) == 3
    assert all(len(line) <= 40 for line in screens(stream)[-1])


def test_one_step_is_no_steps(terminal: Callable[[int], Tty]) -> None:
    stream = terminal(100)
    with Console(stream=stream) as console:
        console(RunStarted(0, 100))
        console(replace(stepped(99), upcoming={"checkpoint": 1}))
        console(RunFinished(99))
    assert "next: checkpoint in 1 step" in [line.strip() for line in screens(stream)[-1]]


def test_a_terminal_has_its_cursor_back_when_the_run_fails(terminal: Callable[[int], Tty]) -> None:
    stream = terminal(120)

    def fail() -> None:
        with Console(stream=stream) as console:
            console(RunStarted(0, 100))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_lines_stay_above_the_bars_of_a_terminal(terminal: Callable[[int], Tty]) -> None:
    stream = terminal(120)
    seconds = iter(range(100))
    with Console(stream=stream, clock=lambda: next(seconds)) as console:
        console(RunStarted(0, 100))
        console(Saved(Path("checkpoint-500"), 500))
        console(Progress("gallery", 0, 1, "pictures"))
        console(Progress("gallery", 1, 1, "pictures"))
        console(RunFinished(100))
        console(Notice("after the bars"))
    shown = stream.getvalue()
    assert shown.index("checkpoint-500") < shown.index("gallery: 1 picture in") < shown.index("after the bars")


def test_a_bar_never_shows_another_total(terminal: Callable[[int], Tty]) -> None:
    stream = terminal(120)
    with Console(stream=stream) as console:
        console(RunStarted(0, 4000))
    assert "/100" not in stream.getvalue()


DURATIONS = [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
