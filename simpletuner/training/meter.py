"""Figures of a run: losses stay on the device until a log point reads them all at once, over all ranks.

A loss or gradient that is not finite is found here too, at the log point or before anything is saved or painted. Under fp16 a
gradient's overflow is no fault: that step was skipped, and is counted. The norm says so; nothing else is asked of the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from simpletuner.data.ranks import Ranks
from simpletuner.data.samples import Batch
from simpletuner.errors import RunError
from simpletuner.reporting.measured import TENTHS, tenth, tenth_name

__all__ = ["Figures", "Meter"]


MOST_SKIPPED = 30
"""Steps skipped one after another that end a run. The scale begins at 2 to the 16th, and each of them halves it."""

Bad = tuple[int, str, str]
"""Step, what was not finite, file."""


@dataclass
class Part:
    """One micro-batch of this rank; its loss is still on the device."""

    files: tuple[str, ...]
    is_regularisation: bool
    loss_B: Tensor
    t_B: Tensor
    """Where each sample's time lies, on the CPU from the start."""


@dataclass
class Turn:
    """One optimiser step of this rank, not yet read."""

    step: int
    parts: list[Part]
    grad_norm: Tensor


@dataclass(frozen=True)
class Figures:
    """What was measured since the last log point, over all ranks."""

    loss: float
    regularisation_loss: float | None
    grad_norm: float
    samples_per_s: float
    time: str
    skipped_steps: int | None
    """Optimiser steps that were skipped for an overflow; None where that cannot be."""
    loss_by_time: dict[str, float] = field(default_factory=dict)
    """Mean loss in each tenth of time that had samples, regularisation apart: "0.0-0.1", ..., "0.9-1.0"."""


@dataclass
class Window:
    """Loss of every sample since the last log point, over all ranks."""

    ordinary: list[float] = field(default_factory=list)
    regularisation: list[float] = field(default_factory=list)
    by_time: list[list[float]] = field(default_factory=lambda: [[] for _ in range(TENTHS)])
    """The ordinary ones again, by the bin of their time."""
    skipped: int = 0
    """Optimiser steps since then that were skipped for an overflow."""
    grad_norm: float | None = None
    """Of the last step that was not."""


class Meter:
    """Collects what the loop hands it; `read` and `figures` wait for the device, nothing else does."""

    def __init__(self, ranks: Ranks, *, may_skip: bool = False) -> None:
        self._ranks = ranks
        self._may_skip = may_skip
        self._skipped_in_a_row = 0
        self._turns: list[Turn] = []
        self._window = Window()
        self._samples = 0
        self._began = time.perf_counter()

    def add(
        self,
        step: int,
        batches: Sequence[Batch],
        losses_B: Sequence[Tensor],
        times_B: Sequence[Tensor],
        grad_norm: Tensor,
    ) -> None:
        """Optimiser step `step` was taken on these micro-batches of this rank, at these times (on the CPU)."""
        parts = [
            Part(batch.files, batch.is_regularisation, loss_B.detach(), t_B)
            for batch, loss_B, t_B in zip(batches, losses_B, times_B, strict=True)
        ]
        self._turns.append(Turn(step, parts, grad_norm))

    def read(self) -> None:
        """Fetch what waits on the device. Raises RunError, on all ranks alike, if some of it is not finite. Collective."""
        turns, self._turns = self._turns, []
        if not turns:  # on every rank, since all take the same steps
            return
        losses = torch.cat([part.loss_B.float() for turn in turns for part in turn.parts]).tolist()
        norms = torch.stack([turn.grad_norm for turn in turns]).tolist()
        found = Window()
        bins: list[int] = []
        bad: list[Bad] = []
        rest = iter(losses)
        for turn, norm in zip(turns, norms, strict=True):
            for part in turn.parts:
                values = list(islice(rest, len(part.loss_B)))
                (found.regularisation if part.is_regularisation else found.ordinary).extend(values)
                bins += [] if part.is_regularisation else [tenth(t) for t in part.t_B.tolist()]
                bad += [
                    (turn.step, "loss", file)
                    for file, value in zip(part.files, values, strict=True)
                    if not math.isfinite(value)
                ]
            if not math.isfinite(norm) and not self._may_skip:
                bad += [(turn.step, "gradient", file) for part in turn.parts for file in part.files]
        told = self._ranks.gather([found.ordinary, found.regularisation, bins, bad])
        if any(theirs for *_, theirs in told):
            raise _not_finite([(step, what, file) for *_, theirs in told for step, what, file in theirs])
        for ordinary, regularisation, their_bins, _ in told:
            self._window.ordinary += ordinary
            for nth, loss in zip(their_bins, ordinary, strict=True):
                self._window.by_time[nth].append(loss)
            self._window.regularisation += regularisation
            self._samples += len(ordinary) + len(regularisation)
        for turn, norm in zip(turns, norms, strict=True):
            self._note_norm(turn.step, norm)

    def _note_norm(self, step: int, norm: float) -> None:
        """Of a step that was taken, or skipped. Raises RunError, on all ranks alike, if too many were skipped in a row."""
        if math.isfinite(norm):
            self._window.grad_norm, self._skipped_in_a_row = norm, 0
            return
        self._window.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise RunError(
                f"The last {MOST_SKIPPED} steps, up to step {step}, were all skipped: their gradients overflowed.",
                why="the loss's scale was halved each time and is far below 1 by now: no scale brings these gradients into "
                "float16's range, for the network's own activations leave it.",
                mend='set mixed_precision to "bf16" on a card that has it, else to "no", and base_model_default_dtype, if it '
                'is "fp16", likewise. The last checkpoint is unhurt.',
            )

    def figures(self) -> Figures:
        """What a log point tells; the next window begins here. Collective."""
        self.read()
        window, samples = self._window, self._samples
        passed_s = time.perf_counter() - self._began
        self._window, self._samples, self._began = Window(), 0, time.perf_counter()
        return Figures(
            loss=_mean(window.ordinary or window.regularisation),
            regularisation_loss=_mean(window.regularisation) if window.regularisation else None,
            grad_norm=math.nan if window.grad_norm is None else window.grad_norm,
            samples_per_s=samples / passed_s,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            skipped_steps=window.skipped if self._may_skip else None,
            loss_by_time={tenth_name(nth): _mean(losses) for nth, losses in enumerate(window.by_time) if losses},
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here (a gallery, a checkpoint) does not count against the speed of training."""
        left = time.perf_counter()
        yield
        self._began += time.perf_counter() - left

    def as_json(self) -> dict[str, Any]:
        """The window that is open, so that a resumed run's next log point says what an unbroken one's would."""
        return {**asdict(self._window), "skipped_in_a_row": self._skipped_in_a_row}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on in the window that `as_json` described."""
        self._skipped_in_a_row = facts.get("skipped_in_a_row", 0)
        self._window = Window(**{one.name: facts[one.name] for one in fields(Window) if one.name in facts})


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)  # exact, so the order of ranks does not show


def _not_finite(bad: list[Bad]) -> RunError:
    step = min(step for step, _, _ in bad)
    first = [(what, file) for at, what, file in bad if at == step]
    what = "loss" if any(what == "loss" for what, _ in first) else "gradient"
    files = sorted({file for kind, file in first if kind == what})
    shown = ", ".join(files[:10]) + (f" and {len(files) - 10} more" if len(files) > 10 else "")
    return RunError(
        f"The {what} of step {step} is not finite. It came from: {shown}.",
        why="the weights have left the range of their number format, or these files or captions are spoiled.",
        mend="look at the files; else lower learning_rate, or set mixed_precision to no. The last checkpoint is unhurt.",
    )
