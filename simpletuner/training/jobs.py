"""Periodic work of a run: when it is due, what the user may ask for in between, and the signals that ask.

A job may touch the model, runs on every rank, and may fail the run. It is run between two optimiser steps.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from simpletuner.training.trainer import Trainer

__all__ = ["Asked", "Due", "Inbox", "Job", "Upcoming", "interval_steps"]


@dataclass(frozen=True)
class Asked:
    """What a user asks of a running training."""

    signal_number: int = 0
    """The signal that asks to stop, or 0."""
    save: bool = False
    validate: bool = False

    @property
    def stop(self) -> bool:
        """Whether the run is to end here."""
        return self.signal_number != 0

    def __or__(self, other: Asked) -> Asked:
        return Asked(max(self.signal_number, other.signal_number), self.save or other.save, self.validate or other.validate)


@dataclass(frozen=True)
class Due:
    """When a job runs."""

    steps: int = 0
    """Every so many optimiser steps; 0 never for this reason."""
    epoch_steps: Fraction = Fraction(0)
    """The same as epochs make it, `interval_steps`: no whole number need be. Due at the first step that has come so far."""
    at_start: bool = False
    at_end: bool = False
    asked: Literal["", "save", "validate"] = ""
    """The wish that it answers."""
    name: str = ""
    """What users call it, who are told when it comes next; "" is not told."""

    def met(self, step: int, asked: Asked, *, is_start: bool, is_end: bool) -> bool:
        """Whether the job runs now, `step` optimiser steps being done. A user who wants to leave waits for saving only."""
        if asked.stop:
            return self.asked == "save"
        if is_start:
            return self.at_start or (is_end and self.at_end)
        wanted = (self.asked == "save" and asked.save) or (self.asked == "validate" and asked.validate)
        return wanted or (is_end and self.at_end) or self.falls_on(step)

    def falls_on(self, step: int) -> bool:
        """Whether `step` is one of those at the interval."""
        if step <= 0:
            return False
        by_steps = self.steps > 0 and step % self.steps == 0
        return by_steps or (self.epoch_steps > 0 and step // self.epoch_steps > (step - 1) // self.epoch_steps)


def interval_steps(epochs: float | None, steps_per_epoch: Fraction) -> Fraction:
    """An interval of `epochs`, which may be a decimal (0.5: twice an epoch), in optimiser steps; 0 for None: never."""
    return Fraction(repr(epochs)) * steps_per_epoch if epochs else Fraction(0)  # as written: 0.1 is a tenth


class Upcoming:
    """How far off each job is. Reckoned anew only when one has come: an interval may be thousands of steps."""

    def __init__(self, dues: Iterable[Due], last: int) -> None:
        """`last` is the step at which training ends."""
        self._dues = [due for due in dues if due.name]
        self._last = last
        self._next: dict[str, int | None] = {}

    def after(self, step: int) -> dict[str, int]:
        """Steps from `step` to the next of each, by name."""
        for due in self._dues:
            known = self._next.get(due.name, 0)
            if known is not None and known <= step:
                self._next[due.name] = self._found(due, step)
        return {name: at - step for name, at in self._next.items() if at is not None}

    def _found(self, due: Due, step: int) -> int | None:
        end = self._last if due.at_end and step < self._last else None
        return next((at for at in range(step + 1, self._last + 1) if due.falls_on(at)), end)


class Job(Protocol):
    """Periodic work."""

    due: Due

    def run(self, trainer: Trainer) -> None:
        """Do it. Called on every rank, in the same order."""
        ...


WISHES = {
    signal.SIGINT: Asked(signal.SIGINT, save=True),
    signal.SIGTERM: Asked(signal.SIGTERM, save=True),
    signal.SIGUSR1: Asked(save=True),  # what Slurm and its kin send ahead of a time limit
    signal.SIGUSR2: Asked(validate=True),
}


class Inbox:
    """Takes signals while its block is open: Ctrl-C and SIGTERM stop, SIGUSR1 saves, SIGUSR2 paints the gallery.

    Nothing is done in the handler; the trainer looks between two steps. A second Ctrl-C or SIGTERM ends the program at once.
    """

    def __init__(self) -> None:
        self._wishes: deque[Asked] = deque()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Inbox:
        self._former = {number: signal.signal(number, self._note) for number in WISHES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def take(self) -> Asked:
        """All that was asked since the last time."""
        asked = Asked()
        while self._wishes:
            asked |= self._wishes.popleft()
        return asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        wish = WISHES[signal.Signals(number)]
        self._wishes.append(wish)
        if wish.stop:
            signal.signal(number, self._former[number])
