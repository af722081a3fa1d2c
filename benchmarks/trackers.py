"""What a tracker costs the training loop: the time until a log point's or a picture's event is taken, wandb offline.

Wall time, since the trackers' own threads and processes do the rest; the median, since a shared machine has bad moments.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import Figure, arguments, say, scratch, tell
from PIL import Image

from simpletuner.config.sections import Hub, Trackers
from simpletuner.events import Event, Painted, RunFinished, RunStarted, Saved, Stepped
from simpletuner.reporting.hub import HubUploads
from simpletuner.reporting.metrics import MetricsFile
from simpletuner.reporting.tensorboard_tracker import TensorboardTracker
from simpletuner.reporting.wandb_tracker import WandbTracker

STEP_MS = 1.0
"""A log point every ten steps of 100 ms and more may cost a thousandth of them."""
PICTURE_MS = 1000.0
"""A picture of 1024 px takes ten seconds and more to paint."""


def log_point(step: int) -> Stepped:
    bins = {f"loss/t_{place / 10:.1f}": 0.5 for place in range(10)}
    return Stepped(step, 1000, 1, 0.5, 1e-4, 0.1, 33.0, "2026-11-20T07:00:00+00:00", {"peak_memory_gib": 20.0, **bins})


def taken_ms(sink: Callable[[Event], None], events: Sequence[Event]) -> float:
    """Median time that the sink keeps its caller."""
    times_s = []
    for event in events:
        began_s = time.perf_counter()
        sink(event)
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s) * 1e3


def painted(folder: Path, count: int) -> list[Painted]:
    """Pictures of noise, the largest files that there are."""
    path = folder / "validation" / "step_10_noise_0_1024x1024.png"
    path.parent.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return [Painted(path, "noise", "noise", step) for step in range(count)]


def checkpoints(folder: Path, count: int) -> list[Saved]:
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "weights.safetensors").write_bytes(bytes(50 << 20))
    return [Saved(folder / "checkpoint-10", step) for step in range(count)]


def main() -> None:
    wanted = arguments(__doc__, points=500, pictures=5)
    os.environ["WANDB_MODE"] = "offline"
    with scratch() as folder:
        pictures = painted(folder, wanted.pictures)
        sinks: dict[str, Callable[[Event], None]] = {
            "metrics.jsonl": MetricsFile(folder / "metrics.jsonl"),
            "tensorboard": TensorboardTracker(folder / "tensorboard", {}),
            "wandb": WandbTracker(Trackers(report_to="wandb"), folder / "logs", {}, say),
        }
        figures = []
        for name, sink in sinks.items():
            sink(RunStarted(0, 1000))
            points = taken_ms(sink, [log_point(step) for step in range(wanted.points)])
            figures.append(Figure(f"{name}: a log point", points, "ms", most=STEP_MS))
            figures.append(Figure(f"{name}: a picture of 1024 px", taken_ms(sink, pictures), "ms", most=PICTURE_MS))
            sink(RunFinished(1000))
        hub = HubUploads(Hub(push_to_hub=True, push_checkpoints_to_hub=True, hub_model_id="nowhere"))
        queued = taken_ms(hub, checkpoints(folder, wanted.pictures))
        figures.append(Figure("the hub: a checkpoint of 50 MiB is queued", queued, "ms", most=STEP_MS))
    tell(figures, as_json=wanted.json)


if __name__ == "__main__":
    main()
