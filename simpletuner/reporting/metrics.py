"""`metrics.jsonl`: one JSON object a line, appended and flushed at once, so that a killed run has told all it knew.

A resumed run goes on in the same file. Steps that it takes again appear again: of two rows of a step, the later one counts.
"""

from __future__ import annotations

import json
import math
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from simpletuner.events import Event, Measured, Painted, Stepped
from simpletuner.reporting.measured import measured_row

__all__ = ["MetricsFile"]


class MetricsFile:
    """The sink that writes `metrics.jsonl`.

    Rows of training have no `kind`; others are of the kind `validation` (a picture of the gallery), `eval` or `clip`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __str__(self) -> str:
        return self._path.name

    def __call__(self, event: Event) -> None:
        """Append what an event says, if it is a figure."""
        row = _row(event, self._path.parent)
        if row is None:
            return
        if self._file is None:  # a run that fails before its first figure leaves no empty file
            self._file = _opened(self._path)
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()


def _opened(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut_off = _is_cut_off(path)
    # Half a surrogate, which UTF-8 has no bytes for, becomes what JSON writes for it: \ud800.
    file = path.open("a", encoding="utf-8", errors="backslashreplace")
    if is_cut_off:
        file.write("\n")
    return file


def _is_cut_off(path: Path) -> bool:
    """Whether an earlier run was killed in the middle of a line."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _row(event: Event, folder: Path) -> dict[str, Any] | None:
    if isinstance(event, Stepped):
        figures = {
            "step": event.step,
            "epoch": event.epoch,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "samples_per_s": event.samples_per_s,
            "time": event.time,
            **event.extra,
        }
        return _finite(figures)
    if isinstance(event, Measured):
        return _finite(measured_row(event))
    if isinstance(event, Painted):
        path = event.path.relative_to(folder) if event.path.is_relative_to(folder) else event.path
        return {
            "kind": "validation",
            "step": event.step,
            "nickname": event.nickname,
            "prompt": event.prompt,
            "file": path.as_posix(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    return None


def _finite(value: Any) -> Any:
    """JSON knows no nan and no infinity: they are null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
