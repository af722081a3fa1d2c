"""What a run will write, where, and whether there is room for it. Upper bounds: prompts at their longest, pictures unpacked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.run import Run
from simpletuner.errors import Problem
from simpletuner.families.base import Shot

__all__ = ["Room", "Writing", "checkpoint_writings", "gallery_writing", "nearest_folder", "rooms", "unwritable"]

PIXEL_BYTES = 3


@dataclass(frozen=True)
class Writing:
    """Something that will be written."""

    what: str
    folder: str
    size_bytes: int
    is_first: bool = True
    """Whether it is written before or at the first checkpoint; what comes later can still be made room for."""
    is_there: bool = False
    """Whether it lies there already, and takes no more room."""


@dataclass(frozen=True)
class Room:
    """A disk."""

    folder: str
    """One of the folders on it."""
    needed_bytes: int
    first_bytes: int
    """Of these, up to the first checkpoint."""
    free_bytes: int


def checkpoint_writings(run: Run, *, saved_bytes: int, result_bytes: int, steps: int) -> list[Writing]:
    """Checkpoints of so many bytes each, and the result."""
    folder, options, each = run.checkpointing.output_dir, run.checkpointing, saved_bytes
    # One at the end as well; an old one goes only after the new one is whole.
    count = -(-steps // options.checkpoint_step_interval) if options.checkpoint_step_interval else 1
    kept = min(count, options.checkpoints_total_limit + 1) if options.checkpoints_total_limit else count
    return [
        Writing("the first checkpoint", folder, each),
        Writing(f"checkpoints, at most {kept} at a time", folder, each * (kept - 1), is_first=False),
        Writing("the result", folder, result_bytes, is_first=False),
    ]


def gallery_writing(run: Run, shots: Sequence[Shot], steps: int) -> Writing:
    """All galleries, of pictures that no compression makes smaller."""
    interval = run.validation.validation_step_interval
    times = (steps // interval if interval else 0) + 1
    pictures = sum(shot.width_px * shot.height_px * PIXEL_BYTES for shot in shots)
    also = (not run.validation.disable_benchmark) + (run.ema.use_ema and run.ema.ema_validation == "comparison") * times
    return Writing("the gallery", run.checkpointing.output_dir, pictures * (times + also), is_first=False)


def rooms(writings: Iterable[Writing]) -> list[Room]:
    """The disks that are written to, with the room on them."""
    found: dict[int, Room] = {}
    for writing in writings:
        if writing.is_there:
            continue
        folder = nearest_folder(Path(writing.folder))
        disk = folder.stat().st_dev
        room = found.get(disk) or Room(writing.folder, 0, 0, shutil.disk_usage(folder).free)
        first = writing.size_bytes if writing.is_first else 0
        found[disk] = Room(
            room.folder, room.needed_bytes + writing.size_bytes, room.first_bytes + first, room.free_bytes
        )  # fmt: skip
    return list(found.values())


def unwritable(option: str, folder: str) -> Problem | None:
    """What is wrong with a folder that a run is to write into, made if need be. Nothing is written to find out."""
    path = Path(folder).expanduser()
    nearest = nearest_folder(path)
    blocking = next((each for each in (path, *path.parents) if os.path.exists(each) and not os.path.isdir(each)), None)
    if blocking is not None:
        what = f"`{option}` is {folder}, but {blocking} is a file."
        return Problem(option, what, mend="choose another folder, or move the file away.")
    if os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return None
    what = f"`{option}` is {folder}, which cannot be written: there is no right to write into {nearest}."
    return Problem(option, what, mend="make the folder writable, or choose another.")


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.expanduser().absolute()
    return next(each for each in (path, *path.parents) if os.path.isdir(each))  # pathlib raises where it may not look
