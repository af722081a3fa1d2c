"""Pictures as files: PNGs with metadata. What cannot be written just now stays in memory and is tried again.

A full disk or a folder without permission neither stops a run nor loses a picture in silence.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from simpletuner.data.whole import write_whole
from simpletuner.events import Notice, Painted, Tell

__all__ = ["PictureFiles", "png_of"]

KEPT_BYTES = 256 * 2**20
"""How much of what could not be written is kept: some two hundred pictures of 1024 px."""
NAMED = 5
"""How many files a message names."""


@dataclass(frozen=True)
class Waiting:
    """A picture that has no file yet, and what is told once it has."""

    png: bytes
    event: Painted


class PictureFiles:
    """Writes pictures, each whole or not at all, and tells of each once it is there."""

    def __init__(self) -> None:
        self._waiting: dict[Path, Waiting] = {}
        self._dropped: list[Path] = []
        self._reason = ""

    def write(self, png: bytes, event: Painted, tell: Tell) -> None:
        """Write a picture at `event.path`, or keep it."""
        self._waiting[event.path] = Waiting(png, event)
        self._attempt(event.path, tell)
        self._limit()

    def retry(self, tell: Tell) -> None:
        """Write what could not be written before."""
        for path in list(self._waiting):
            self._attempt(path, tell)

    def has(self, path: Path) -> bool:
        """Whether a picture lies at `path`, or waits to."""
        return path in self._waiting or path.is_file()

    def open(self, path: Path) -> Image.Image:
        """The picture that lies at `path`, or waits to. Raises OSError."""
        return Image.open(io.BytesIO(self._waiting[path].png) if path in self._waiting else path)

    def report(self, tell: Tell, *, is_last: bool) -> None:
        """Say, once a gallery, what has no file. `is_last`: there is no other gallery to write it with."""
        if is_last:
            self.retry(tell)
            self._dropped += self._waiting
            self._waiting.clear()
        if self._dropped:
            text = f"{_listed(self._dropped)} could not be written and {_is(self._dropped)} lost: {self._reason}."
            mend = " Make room and start the same command again: it paints what is missing of the last step." if is_last else ""
            tell(Notice(text + mend, "warning"))
            self._dropped.clear()
        if self._waiting:
            text = f"{_listed(list(self._waiting))} could not be written: {self._reason}. Training goes on; "
            text += f"{_is(self._waiting)} kept in memory, to be written with the next gallery. Make room till then."
            tell(Notice(text, "warning"))

    def _attempt(self, path: Path, tell: Tell) -> None:
        waiting = self._waiting[path]
        try:
            write_whole(path, waiting.png)
        except OSError as error:
            self._reason = str(error)
            return
        del self._waiting[path]
        tell(waiting.event)

    def _limit(self) -> None:
        """The oldest go where there are too many."""
        while sum(len(one.png) for one in self._waiting.values()) > KEPT_BYTES:
            path = next(iter(self._waiting))
            del self._waiting[path]
            self._dropped.append(path)


def png_of(image: Image.Image, texts: Mapping[str, str], *, compression: int = 6) -> bytes:
    """A whole PNG file with metadata. `compression`: 1 is quickest, 9 smallest."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info, compress_level=compression)
    return file.getvalue()


def _listed(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:NAMED])
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"{len(paths)} picture{'s' if len(paths) > 1 else ''} of {paths[0].parent} ({names}{more})"


def _is(paths: Sized) -> str:
    return "is" if len(paths) == 1 else "are"
