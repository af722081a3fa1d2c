"""Trackers: programs that draw a run's figures. Each is a sink of its own, so that one that fails costs the others nothing.

What is the same for all stands here: which figures an event holds, and a picture's tag.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from simpletuner.config.run import Run
from simpletuner.events import Measured, Painted, Sink, Stepped, Tell
from simpletuner.reporting.measured import tenth, tenth_name

__all__ = ["LOGS", "figures", "is_there", "open_trackers", "tag"]

log = logging.getLogger("simpletuner")

LOGS = "logs"
"""Folder of the trackers' files, in the run's."""


@contextmanager
def open_trackers(run: Run, config: Mapping[str, Any], tell: Tell) -> Iterator[list[Sink]]:
    """The chosen trackers. `config` is the resolved configuration; notices go to `tell`. For rank 0 only.

    They start when training does and end with it, both as sinks, so that one that cannot hurts nothing.
    """
    from simpletuner.reporting.tensorboard_tracker import TensorboardTracker
    from simpletuner.reporting.wandb_tracker import WandbTracker

    folder = Path(run.checkpointing.output_dir) / LOGS
    sinks: list[Sink] = []
    with ExitStack() as stack:
        if "tensorboard" in run.trackers.trackers:
            sinks.append(stack.enter_context(closing(TensorboardTracker(folder / "tensorboard", config))))
        if "wandb" in run.trackers.trackers and find_spec("wandb"):  # that it is missing is told with the configuration
            sinks.append(WandbTracker(run.trackers, folder, config, tell))
        yield sinks


def figures(event: Stepped | Measured) -> dict[str, float]:
    """What an event holds to be drawn over steps, by the names of `metrics.jsonl`.

    Of a curve over time, the mean in each tenth of it is a figure of its own, "eval_loss_by_time/0.5-0.6": TensorBoard draws
    over steps only, and before wandb takes a table it asks its server and waits for an answer, 20 s if none comes (wandb 0.31).
    """
    if isinstance(event, Measured):
        return {**event.figures, **_by_tenth(event.curves)}
    own = {
        "loss": event.loss,
        "learning_rate": event.learning_rate,
        "grad_norm": event.grad_norm,
        "epoch": event.epoch,
        "samples_per_s": event.samples_per_s,
    }
    return {**own, **event.extra}


def _by_tenth(curves: Mapping[str, list[tuple[float, float]]]) -> dict[str, float]:
    losses: dict[str, list[float]] = {}
    for name, points in curves.items():
        for t, loss in points:
            losses.setdefault(f"{name}_by_time/{tenth_name(tenth(t))}", []).append(loss)
    return {name: fmean(values) for name, values in losses.items()}


def tag(event: Painted) -> str:
    """The same for a picture of every step: "validation/cat_1_1024x1024"; the base's own are "benchmark/cat_1_1024x1024".

    From the file's name, which holds the nickname without what trackers do not take, and is unlike any other's.
    """
    name = re.sub(r"^step_\d+_", "", event.path.stem)
    return f"{event.path.parent.name}/{name}"


def is_there(event: Painted) -> bool:
    """Whether the picture can be read. One that is gone is left out, with a line: no reason to switch a tracker off."""
    try:
        with Image.open(event.path):
            return True
    except OSError as error:
        log.warning("A picture is left out of the tracker: %s", error)
        return False
