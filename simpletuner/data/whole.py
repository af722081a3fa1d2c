"""Files that are written whole or not at all, whatever kills the writer or fills the disk.

What a killed writer left half done (`.*.tmp`) is never read; that of a process of this machine that is gone is removed.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["remove_leftovers", "this_machine", "write_pieces", "write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one. Its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[Any]) -> None:
    """A temporary name in the same folder, fsync, rename, fsync of the folder. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{this_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Delete what writers on this machine that are gone left half written, of one file or of all; others may be at work."""
    end = f".{this_machine()}."
    with os.scandir(folder) as entries:
        left = [
            entry.name
            for entry in entries
            if entry.name.endswith(".tmp") and entry.name.startswith(f".{name}") and end in entry.name
        ]
    for leftover in left:
        with suppress(ValueError, PermissionError):  # not our naming; a living process of another user
            try:
                os.kill(int(leftover.split(".")[-3]), 0)
            except ProcessLookupError:
                (folder / leftover).unlink(missing_ok=True)


def this_machine() -> str:
    """Its name as a part of a file's."""
    return socket.gethostname().replace(".", "-")
