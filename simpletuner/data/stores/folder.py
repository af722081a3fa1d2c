"""A local folder as a store: searched with its sub-folders, and never written into."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from simpletuner.data.geometry import WH
from simpletuner.data.pixels import measure
from simpletuner.data.stores.base import NO_FILE, Files, Listing, Stamp, kind_of
from simpletuner.events import Tell

__all__ = ["Folder", "search"]


class Folder:
    """Pictures in a folder and below it."""

    key = "instance_data_dir"
    in_flight = 1
    captions_from = ""

    def __init__(self, path: str | Path) -> None:
        self.root = str(Path(path).expanduser().resolve())

    def listing(self, tell: Tell) -> Listing:
        """All pictures and caption files there."""
        return search(self.root)

    def measure(self, file: str) -> WH:
        """From the header of a file."""
        return measure(os.path.join(self.root, file))

    def read(self, file: str) -> bytes:
        """All of a file."""
        with open(os.path.join(self.root, file), "rb") as opened:
            return opened.read()


def search(root: str) -> Listing:
    """All pictures and caption files in a folder and below it, hidden ones (`.x`, so macOS's `._x.jpg` too) left out.

    A folder is searched once, whatever links lead to it: under its own path if that lies below `root`.
    """
    found = Files()
    visited: set[tuple[int, int]] = set()
    folders: list[tuple[str, str]] = [(root, "")]
    links: list[tuple[str, str]] = []
    while folders or links:
        links.sort(reverse=True)
        path, within = (folders or links).pop()
        try:
            facts = os.stat(path)
            if (facts.st_dev, facts.st_ino) in visited:
                continue
            visited.add((facts.st_dev, facts.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        (links if entry.is_symlink() else folders).append((entry.path, f"{within}{entry.name}/"))
                    elif kind := kind_of(entry.name):
                        found.add(within + entry.name, *_facts(entry, kind))
        except OSError as error:
            found.closed[within] = error.strerror or str(error)
    return found.listing()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say, which must not hide its neighbours: it counts as a file that cannot be opened
        return False


def _facts(entry: os.DirEntry[str], kind: str) -> tuple[str, Stamp]:
    """The kind of a file, "" for a pipe or the like, and its stamp."""
    try:
        facts = entry.stat()
    except OSError:
        return kind, NO_FILE  # a link that leads nowhere: found, though it cannot be opened
    return kind if stat.S_ISREG(facts.st_mode) else "", Stamp(facts.st_size, facts.st_mtime_ns)
