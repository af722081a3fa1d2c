"""What a run tells its watchers: frozen events of plain numbers and paths, and the bus that carries them.

Watchers (console, metrics file, trackers, webhooks) see events on rank 0 only and can never hurt a run. Standard library only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = [
    "Bus",
    "Event",
    "Measured",
    "Notice",
    "Painted",
    "Previewed",
    "Progress",
    "ResultReady",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "Saved",
    "Sink",
    "Stepped",
    "Tell",
    "Weights",
]

log = logging.getLogger("simpletuner")

Weights = Literal["base", "trained", "ema"]
"""Whose pictures and figures: the untouched base's, the newest weights', their average's."""


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class Notice(Event):
    """One line for the user: a decision taken for them, a warning."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class Progress(Event):
    """A long task has come so far: `done` of `total` items. The last one of a task has done == total."""

    task: str
    done: int
    total: int
    unit: str = "items"


@dataclass(frozen=True)
class RunStarted(Event):
    """Training begins at `step` of `steps` optimiser steps."""

    step: int
    steps: int


@dataclass(frozen=True)
class Stepped(Event):
    """A log point: figures since the last one, already reduced over ranks. `time` is UTC in ISO 8601."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    samples_per_s: float
    time: str
    extra: dict[str, float] = field(default_factory=dict)
    upcoming: dict[str, int] = field(default_factory=dict)
    """Steps until the next checkpoint, gallery and the like."""
    steps_per_s: float = 0.0
    """Optimiser steps; 0 if unknown."""


@dataclass(frozen=True)
class Painted(Event):
    """A picture of the gallery lies at `path`."""

    path: Path
    nickname: str
    prompt: str
    step: int
    weights: Weights = "trained"


@dataclass(frozen=True)
class Previewed(Event):
    """A picture of the gallery in the making, after `inference_step` of `inference_steps`: `png` is the frame, a whole file."""

    png: bytes
    nickname: str
    prompt: str
    step: int
    inference_step: int
    inference_steps: int
    weights: Weights = "trained"


@dataclass(frozen=True)
class Measured(Event):
    """The model was judged at `step`, over all ranks: `eval` loss or `clip` score."""

    kind: Literal["eval", "clip"]
    step: int
    figures: dict[str, float]
    """What trackers plot over steps: "eval_loss", "eval_loss/<dataset>", "clip_score/mean"."""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By name, (x, y) of a curve: the loss over time t, say."""


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint (or, if `final`, the result) is whole at `path`."""

    path: Path
    step: int
    final: bool = False


@dataclass(frozen=True)
class ResultReady(Event):
    """All that a finished run leaves for others to use lies on disk: `files` by their place in a repository of it."""

    files: dict[str, Path]


@dataclass(frozen=True)
class RunFinished(Event):
    """Training ended at `step`."""

    step: int


@dataclass(frozen=True)
class RunFailed(Event):
    """The run ended before its time: by a failure or, if `is_stopped`, as the user wished. Words for users, without secrets."""

    what: str
    why: str = ""
    mend: str = ""
    is_stopped: bool = False


Tell = Callable[[Event], None]
Sink = Callable[[Event], None]


class Bus:
    """Hands each event to every sink; a sink that fails is named once and left out from then on."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def __call__(self, event: Event) -> None:
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception as error:  # noqa: BLE001  # a watcher can never hurt a run
                self._sinks.remove(sink)
                why = str(error) or type(error).__name__
                log.warning("%s failed and is switched off for this run: %s", sink, why)
