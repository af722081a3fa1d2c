"""What a user sees of a run, on stderr: one live display on a terminal (`terminal.py`), plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console as Terminal

from simpletuner.events import Event, Measured, Notice, Painted, Progress, RunFinished, RunStarted, Saved, Stepped
from simpletuner.reporting.measured import measured_line
from simpletuner.reporting.terminal import OnTerminal

__all__ = ["Console", "duration"]

LEVELS = ("debug", "info", "warning", "error")
LINE_EVERY_S = 10.0
"""Pause between two lines of one long task, where there are no bars."""
BRIEF_S = 1.0
"""A task that took less is over before anybody asked: no line tells of its end."""
TRAINING = "training"


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

    def figures(self, task: str, figures: str, upcoming: str) -> None:
        """How the task goes, and what comes next in it."""

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

    def __str__(self) -> str:
        return "The console"

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
            # Timed from the first log point on: before it lie the first gallery and a slow first step.
            left = self._left(TRAINING, event.step, event.steps)
            self._display.figures(TRAINING, _figures(event), _upcoming(event))
            self._display.show(TRAINING, event.step, event.steps, f"{left}{_speed(event)}")
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


def _speed(event: Stepped) -> str:
    steps = f"{event.steps_per_s:.3g} it/s, " if event.steps_per_s else ""
    return f"{steps}{event.samples_per_s:.3g} samples/s"


def _figures(event: Stepped) -> str:
    figures = f"loss {event.loss:.4f}, norm {event.grad_norm:.3g}, lr {event.learning_rate:.2e}, epoch {event.epoch}"
    if (memory_gib := event.extra.get("peak_memory_gib")) is not None:
        figures += f", memory {memory_gib:.1f} GiB at peak"
        if (share := event.extra.get("peak_memory_share")) is not None:
            figures += f" ({share:.0%})"
    return figures


def _upcoming(event: Stepped) -> str:
    """ "next: checkpoint in 40 steps, gallery in 90", the nearest first."""
    first, *rest = sorted(event.upcoming.items(), key=lambda one: one[1]) or [("", 0)]
    if not first[0]:
        return ""
    head = f"next: {first[0]} in {first[1]:,} {'step' if first[1] == 1 else 'steps'}"
    return ", ".join([head, *(f"{name} in {steps:,}" for name, steps in rest)])


class InLog:
    """Plain lines, flushed: for files, pipes and notebooks of other programs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._said_s: dict[str, float] = {}
        self._figures: dict[str, str] = {}

    def line(self, text: str, *, warn: bool) -> None:
        print(f"warning: {text}" if warn else text, file=self._stream, flush=True)

    def show(self, task: str, done: int, total: int, status: str) -> None:
        now_s = self._clock()
        is_early = now_s - self._said_s.setdefault(task, now_s) < LINE_EVERY_S
        if is_early and task != TRAINING:  # training speaks at its log points only, and each is wanted
            return
        self._said_s[task] = now_s
        said = ", ".join(part for part in (status, self._figures.pop(task, "")) if part)
        self.line(f"{task}: {done:,}/{total:,}" + (f"  {said}" if said else ""), warn=False)

    def figures(self, task: str, figures: str, upcoming: str) -> None:
        self._figures[task] = figures  # what comes next would be repeated on every line

    def end(self, task: str) -> None:
        self._said_s.pop(task, None)

    def close(self) -> None:
        pass


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
