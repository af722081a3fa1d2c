"""Folders on disk that are whole or not there, and the lock that keeps two runs out of one folder."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from simpletuner.data.ranks import Ranks, together
from simpletuner.errors import RunError, UserError
from simpletuner.events import Notice, Tell

__all__ = ["locked", "move_into_place", "remove", "staged"]

STAGING, DELETING = ".staging-", ".deleting-"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What file systems without locks say (some cluster mounts)."""


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, to fill and then move into place; gone after the block.

    Raises RunError if the disk is full or the like: whatever was there before is unhurt.
    """
    folder = target.parent / f"{STAGING}{target.name}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        free_gib = shutil.disk_usage(target.parent).free / 2**30
        raise RunError(
            f"{target} could not be written: {error}.",
            why=f"{free_gib:.2f} GiB are free there.",
            mend="make room there and start the same command again: it goes on from the last checkpoint, which is unhurt.",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(staging: Path, target: Path) -> None:
    """Make `staging`, a file or folder, durable and name it `target`; a former `target` is there until then."""
    for path in [staging, *staging.rglob("*")] if staging.is_dir() else [staging]:
        _flush(path)
    if target.is_dir():
        former = target.parent / f"{DELETING}{target.name}"
        shutil.rmtree(former, ignore_errors=True)
        target.rename(former)
        staging.rename(target)
        shutil.rmtree(former)
    else:
        staging.replace(target)
    _flush(target.parent)


def remove(folder: Path) -> None:
    """Delete a folder that must never be seen half deleted."""
    hidden = folder.parent / f"{DELETING}{folder.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


@contextmanager
def locked(output_dir: Path, ranks: Ranks, tell: Tell) -> Iterator[None]:
    """Keep `output_dir`, made if need be, for this run. Raises UserError if another one has it.

    The lock goes with the process, however it ends. What a killed run left half written is cleared away.
    """
    handle: list[int] = []
    together(ranks, lambda: handle.append(_lock(output_dir, tell)) if ranks.rank == 0 else None)
    try:
        yield
    finally:
        for descriptor in handle:
            os.close(descriptor)


def _lock(output_dir: Path, tell: Tell) -> int:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f'output_dir "{output_dir}" cannot be written: {error}.', mend="choose a folder of your own."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 32).decode()
        os.close(descriptor)
        raise UserError(
            f'output_dir "{output_dir}" is in use by another run (process {owner}).',
            why="two runs would overwrite each other's checkpoints.",
            mend="wait for it or stop it, or choose another output_dir.",
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        tell(Notice(f'"{output_dir}" lies on a file system without locks: see that no second run uses it.', "warning"))
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    for left in [*output_dir.glob(f"{STAGING}*"), *output_dir.glob(f"{DELETING}*")]:
        shutil.rmtree(left)
    return descriptor


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
