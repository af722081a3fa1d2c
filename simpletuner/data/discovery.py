"""Discovery: search a folder and measure what is new in it. A file of unchanged size and time is not opened again.

Gives the manifest of everything found; what of it is used, and how, is decided in `index.py`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.captions import LARGEST_TEXT_BYTES, decode
from simpletuner.data.manifest import UNKNOWN, Ints, Manifest, Texts
from simpletuner.data.pixels import Unreadable, measure

__all__ = ["CANNOT_OPEN", "READABLE", "Listing", "caption_file", "discover", "search"]

READABLE = (
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .avif .avifs .jp2 .j2k .jpf .jpx .jpc .ppm .pgm .pbm .pnm .qoi"
)
ENDINGS = frozenset([*READABLE.split(), ".heic", ".heif", ".jxl"])
"""Of files that count as found. The last three cannot be read: so the ledger tells of them, rather than nobody."""

CANNOT_OPEN = "cannot be opened"
"""The one reason that is no fault of a file's bytes: it is tried again at every start."""

TELL_EVERY_S = 0.5


class Stamp(NamedTuple):
    """What tells whether a file has changed."""

    size: int
    mtime_ns: int


NO_FILE = Stamp(UNKNOWN, 0)


@dataclass
class Listing:
    """What a search found: paths within the folder, with `/`."""

    pictures: dict[str, Stamp] = field(default_factory=dict)
    """In the order of their paths."""
    texts: dict[str, Stamp] = field(default_factory=dict)
    """Caption files, by their paths."""
    closed: dict[str, str] = field(default_factory=dict)
    """Folders that could not be searched ("" is the first of all), and why."""


def search(root: Path) -> Listing:
    """All pictures and caption files in a folder and below it, hidden ones (`.x`, so macOS's `._x.jpg` too) left out.

    A folder is searched once, whatever links lead to it: under its own path if that lies below `root`.
    """
    listing = Listing()
    visited: set[tuple[int, int]] = set()
    folders: list[tuple[str, str]] = [(str(root), "")]
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
                    else:
                        _list_file(entry, within + entry.name, listing)
        except OSError as error:
            listing.closed[within] = error.strerror or str(error)
    listing.pictures = dict(sorted(listing.pictures.items()))
    return listing


def discover(
    root: Path, listing: Listing, old: Manifest | None, *, with_captions: bool, progress: Callable[[int, int], None]
) -> Manifest:
    """The manifest of what was found, for which only what is not as in `old` is read. `old` itself if nothing is new.

    `progress` is told how many pictures are measured and how many there are to measure. What cannot be read is a fault.
    """
    if old is None or old.root != str(root):
        old = Manifest.empty(str(root))
    files = list(listing.pictures)
    row_of = {file: row for row, file in enumerate(old.files.strings())}
    rows = np.fromiter((row_of.get(file, -1) for file in files), np.int64, len(files))
    sizes, times = _columns(listing.pictures.values())
    beside = [caption_file(file) for file in files] if with_captions else []
    caption_sizes, caption_times = _columns([listing.texts.get(text, NO_FILE) for text in beside] or [NO_FILE] * len(files))

    again = [row for row, (reason, _) in old.faults.items() if reason == CANNOT_OPEN]
    same = _unchanged(rows, (old.sizes, sizes), (old.times, times)) & ~np.isin(rows, again)
    same_captions = _unchanged(rows, (old.caption_sizes, caption_sizes), (old.caption_times, caption_times))
    is_in_order = len(old) == len(files) and bool((rows == np.arange(len(files))).all())
    if is_in_order and same.all() and same_captions.all() and with_captions == old.has_captions:
        return old

    new = Manifest(
        root=str(root),
        has_captions=with_captions,
        files=Texts.of(files),
        sizes=sizes,
        times=times,
        edges=_carried(old.edges, rows),
        caption_sizes=caption_sizes,
        caption_times=caption_times,
        captions=_read_captions(root, beside or files, old, np.where(same_captions, rows, -1), caption_sizes),
        faults={row: old.faults[rows[row]] for row in np.flatnonzero(same & np.isin(rows, list(old.faults))).tolist()},
        digests=_carried(old.digests, rows),
        latent_keys=_carried(old.latent_keys, rows),
        recipes=_carried(old.recipes, rows),
        is_current=_carried(old.is_current, rows) & same,
    )
    _measure(new, files, np.flatnonzero(~same).tolist(), progress)
    return new


def caption_file(file: str) -> str:
    """The path of the caption file beside a picture."""
    return file.rpartition(".")[0] + ".txt"


def _unchanged(rows: Ints, *pairs: tuple[Ints, Ints]) -> NDArray[np.bool_]:
    """Where a picture has a row in the old columns, and the new ones say the same."""
    return np.logical_and.reduce([rows >= 0, *(_carried(old, rows) == new for old, new in pairs)])


def _carried(column: NDArray[Any], rows: Ints) -> NDArray[Any]:
    """An old column in the new order: `rows` are the old ones, -1 for what is new and gets zero."""
    values = np.zeros((len(rows), *column.shape[1:]), column.dtype)
    values[rows >= 0] = column[rows[rows >= 0]]
    return values


def _measure(manifest: Manifest, files: list[str], rows: list[int], progress: Callable[[int, int], None]) -> None:
    """Fill in edges and faults of these rows."""
    told_at = time.monotonic()
    for done, row in enumerate(rows, 1):
        manifest.edges[row] = 0
        try:
            manifest.edges[row] = measure(os.path.join(manifest.root, files[row]))
        except Unreadable as error:
            manifest.faults[row] = (error.reason, error.detail)
        except OSError as error:
            manifest.faults[row] = (CANNOT_OPEN, error.strerror or str(error))
        if (now := time.monotonic()) - told_at > TELL_EVERY_S or done == len(rows):
            progress(done, len(rows))
            told_at = now


def _read_captions(root: Path, texts: list[str], old: Manifest, rows: Ints, sizes: Ints) -> Texts:
    """What the caption files say: as row `rows` of the old manifest, or where that is -1, as the file, if there is one.

    One too large to be a caption says nothing.
    One that cannot be opened counts as missing: its size becomes UNKNOWN, so that the next start tries it again.
    """
    captions = []
    for new, (text, row) in enumerate(zip(texts, rows.tolist(), strict=True)):
        caption = ""
        if row >= 0:
            caption = old.captions.at(row)
        elif UNKNOWN < sizes[new] <= LARGEST_TEXT_BYTES:
            try:
                with open(os.path.join(root, text), "rb") as file:
                    caption = (decode(file.read()) or "").strip()
            except OSError:
                sizes[new] = UNKNOWN
        captions.append(caption)
    return Texts.of(captions)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say, which must not hide its neighbours: it counts as a file that cannot be opened
        return False


def _list_file(entry: os.DirEntry[str], within: str, listing: Listing) -> None:
    """Note a file, if it is a picture or a caption."""
    _, dot, ending = entry.name.rpartition(".")
    ending = dot + ending.lower()
    if ending not in ENDINGS and ending != ".txt":
        return
    try:
        facts = entry.stat()
        if not stat.S_ISREG(facts.st_mode):
            return
        stamp = Stamp(facts.st_size, facts.st_mtime_ns)
    except OSError:
        stamp = NO_FILE  # a link that leads nowhere: found, though it cannot be opened
    (listing.texts if ending == ".txt" else listing.pictures)[within] = stamp


def _columns(stamps: Iterable[Stamp]) -> tuple[Ints, Ints]:
    pairs = np.fromiter(chain.from_iterable(stamps), np.int64).reshape(-1, 2)
    return pairs[:, 0].copy(), pairs[:, 1].copy()
