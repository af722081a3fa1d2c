"""TensorBoard's event files, by the writer of the `tensorboard` package: no TensorFlow, no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from simpletuner.events import Event, Measured, Painted, RunFinished, RunStarted, Stepped
from simpletuner.reporting.trackers import figures, is_there, tag

__all__ = ["TensorboardTracker"]

FLUSH_S = 10
"""Longest time for which the newest figures are not yet in the file."""
QUEUE = 100
"""Events that a slow disk may leave waiting before it holds the caller up."""


class TensorboardTracker:
    """The sink that writes into `folder`, from a thread of the writer's own. Nothing is written before training starts.

    A resumed run goes on in a new file of the same folder, which TensorBoard shows as one run.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self._writer: Any = None

    def __call__(self, event: Event) -> None:
        """Write what an event holds to be drawn."""
        if isinstance(event, RunStarted):
            self._start(event.step)
        elif isinstance(event, Stepped | Measured):
            self._write(event.step, [{"tag": name, "simple_value": value} for name, value in figures(event).items()])
        elif isinstance(event, Painted) and is_there(event):
            self._write(event.step, [{"tag": tag(event), "image": _picture(event.path)}])
        elif isinstance(event, RunFinished) and self._writer is not None:
            self._writer.flush()

    def __str__(self) -> str:
        return "The tracker tensorboard"

    def close(self) -> None:
        """Write what waits, and end the file; on a full disk that was told already."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def _start(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.text.summary_v2 import text_pb

        if step:  # from this mark's step on, what a killed run told is dropped: those steps are taken again
            mark = SessionLog(status=SessionLog.START)
            self._opened().add_event(Record(wall_time=time.time(), step=step + 1, session_log=mark))
        text = f"```json\n{json.dumps(self._config, indent=2, ensure_ascii=False)}\n```"
        self._opened().add_event(Record(wall_time=time.time(), step=step, summary=text_pb("config", text)))

    def _write(self, step: int, values: Iterable[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value) for value in values])
        self._opened().add_event(Record(wall_time=time.time(), step=step, summary=summary))

    def _opened(self) -> Any:
        if self._writer is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(self._folder), max_queue_size=QUEUE, flush_secs=FLUSH_S)
        return self._writer


def _picture(path: Path) -> Any:
    """The file as it is, so that nothing is decoded."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(path) as image:
        width_px, height_px = image.size
        channels = len(image.getbands())
    return Summary.Image(width=width_px, height=height_px, colorspace=channels, encoded_image_string=path.read_bytes())
