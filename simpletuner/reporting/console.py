"""What a user sees of a run, on stderr: bars with speed and time left on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from simpletuner.events import Event, Measured, Notice, Painted, Progress, RunFinished, RunStarted, Saved, Stepped
from simpletuner.reporting.measured import measured_line

__all__ = ["Console", "duration"]

LEVELS = ("debug", "info", "warning", "error")
LINE_EVERY_S = 10.0
"""Pause between two lines of one long task, where there are no bars."""
BRIEF_S = 1.0
"""A task that took less is over before anybody asked: no line tells of its end."""
TRAINING = "training"
WIDE = 110
"""Columns from which a terminal has room for bars besides the figures."""


@dataclass
class Pace:
    """Where a task began, for this process: what an earlier one did is no part of its speed."""

    done: int
    at_s: float

    def speed(self, done: int, now_s: float) -> float:
        """Items a second so far; 0 before there is anything to measure."""
        seconds = now_s - self.at_s
        return (done - self.done) / seconds if seconds > 0 else 0.0


class Display(Protocol):
    """How progress and lines reach the user."""

    def line(self, text: str, *, warn: bool) -> None:
        """One line that stays."""

    def show(self, task: str, done: int, total: int, status: str) -> None:
        """A task stands at `done` of `total`."""

    def end(self, task: str) -> None:
        """A task is over."""

    def close(self) -> None:
        """The run is over."""


class Console:
    """The sink that talks to the user. A context: bars end with its block, whatever ends it."""

    def __init__(
        self, level: str = "info", *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        terminal = Terminal(file=stream or sys.stderr)
        self._level = LEVELS.index(level)
        self._clock = clock
        self._display: Display = OnTerminal(terminal) if terminal.is_terminal else InLog(stream or sys.stderr, clock)
        self._paces: dict[str, Pace] = {}

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars away."""
        self._display.close()

    def __call__(self, event: Event) -> None:
        """Show an event, if it weighs enough for `level`."""
        if isinstance(event, Notice):
            self._line(event.text, "warning" if event.level == "warning" else "info")
        elif isinstance(event, Measured):
            self._line(measured_line(event), "info")
        elif isinstance(event, Painted):
            self._line(f"Painted {event.path}", "debug")
        elif isinstance(event, Saved):
            self._line(f"Saved the {'result' if event.final else 'checkpoint'} of step {event.step}: {event.path}", "info")
        elif self._level <= LEVELS.index("info"):
            self._progress(event)

    def _line(self, text: str, level: str) -> None:
        if LEVELS.index(level) >= self._level:
            self._display.line(text, warn=level == "warning")

    def _progress(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._display.show(TRAINING, event.step, event.steps, "")
        elif isinstance(event, Stepped):
            figures = f"loss {event.loss:.4f}, norm {event.grad_norm:.3g}, lr {event.learning_rate:.2e}, epoch {event.epoch}"
            # Timed from the first log point on: before it lie the first gallery and a slow first step.
            status = f"{self._left(TRAINING, event.step, event.steps)}{event.samples_per_s:.3g} samples/s, {figures}"
            self._display.show(TRAINING, event.step, event.steps, status)
        elif isinstance(event, RunFinished):
            self._display.end(TRAINING)
        elif isinstance(event, Progress):
            self._task(event)

    def _task(self, event: Progress) -> None:
        pace = self._paces.setdefault(event.task, Pace(event.done, self._clock()))
        speed = pace.speed(event.done, self._clock())
        if event.done < event.total:
            status = f"{self._left(event.task, event.done, event.total)}{speed:.3g} {event.unit}/s" if speed else ""
            self._display.show(event.task, event.done, event.total, status)
            return
        del self._paces[event.task]
        self._display.end(event.task)
        took_s = self._clock() - pace.at_s
        if took_s >= BRIEF_S:
            unit = event.unit.removesuffix("s") if event.done == 1 else event.unit
            self._display.line(f"{event.task}: {event.done:,} {unit} in {duration(took_s)}", warn=False)

    def _left(self, task: str, done: int, total: int) -> str:
        now_s = self._clock()
        speed = self._paces.setdefault(task, Pace(done, now_s)).speed(done, now_s)
        return f"{duration((total - done) / speed)} left, " if speed and done < total else ""


class InLog:
    """Plain lines, flushed: for files, pipes and notebooks of other programs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._said_s: dict[str, float] = {}

    def line(self, text: str, *, warn: bool) -> None:
        print(f"warning: {text}" if warn else text, file=self._stream, flush=True)

    def show(self, task: str, done: int, total: int, status: str) -> None:
        now_s = self._clock()
        is_early = now_s - self._said_s.setdefault(task, now_s) < LINE_EVERY_S
        if is_early and task != TRAINING:  # training speaks at its log points only, and each is wanted
            return
        self._said_s[task] = now_s
        self.line(f"{task}: {done:,}/{total:,}" + (f"  {status}" if status else ""), warn=False)

    def end(self, task: str) -> None:
        self._said_s.pop(task, None)

    def close(self) -> None:
        pass


class Status(ProgressColumn):
    """Time left, speed and figures; where the terminal is narrow this column is cut, not the others."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], style="dim", no_wrap=True, overflow="ellipsis")


class OnTerminal:
    """One bar for each task that is under way; lines scroll above."""

    def __init__(self, terminal: Terminal) -> None:
        bar = [BarColumn(20)] if terminal.width >= WIDE else []
        self._bars = Bars(
            TextColumn("{task.description}", markup=False), *bar, MofNCompleteColumn(), Status(), console=terminal
        )
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str, *, warn: bool) -> None:
        shown, style = (f"warning: {text}", "yellow") if warn else (text, None)
        self._bars.console.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)

    def show(self, task: str, done: int, total: int, status: str) -> None:
        if task not in self._tasks:
            self._bars.start()
            self._tasks[task] = self._bars.add_task(task, total=total, completed=done, status=status)
        self._bars.update(self._tasks[task], completed=done, total=total, status=status)

    def end(self, task: str) -> None:
        if task not in self._tasks:
            return
        self._bars.refresh()  # what came after the last of the ten frames a second
        self._bars.remove_task(self._tasks.pop(task))
        if not self._tasks:
            self._bars.stop()

    def close(self) -> None:
        for task in list(self._tasks):
            self.end(task)


def duration(seconds: float) -> str:
    """ "42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
