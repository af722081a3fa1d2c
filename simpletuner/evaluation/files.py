"""Pictures as files: PNGs with metadata. What cannot be written just now stays in memory and is tried again.

Each process has its own pictures; what became of them is told elsewhere (`news.py`), once for all processes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from simpletuner.data.whole import write_whole

__all__ = ["Account", "PictureFiles", "png_of"]

KEPT_BYTES = 256 * 2**20
"""How much of what could not be written a process keeps: some two hundred pictures of 1024 px."""


@dataclass(frozen=True)
class Account:
    """What became of one process's pictures, by their paths. Survives JSON, as what ranks tell each other must."""

    written: list[str]
    """Since the last account."""
    waiting: list[str]
    """Still without a file, kept in memory."""
    lost: list[str]
    """Since the last account."""
    reason: str
    """Why the last one that failed could not be written; empty if none did."""


class PictureFiles:
    """Writes the pictures of this process, each whole or not at all."""

    def __init__(self) -> None:
        self._waiting: dict[Path, bytes] = {}
        self._written: list[Path] = []
        self._lost: list[Path] = []
        self._reason = ""

    def write(self, path: Path, png: bytes) -> None:
        """Write a picture, or keep it."""
        self._waiting[path] = png
        self._attempt(path)
        self._limit()

    def retry(self) -> None:
        """Write what could not be written before."""
        for path in list(self._waiting):
            self._attempt(path)

    def give_up(self) -> None:
        """Try once more; what still has no file is lost."""
        self.retry()
        self._lost += self._waiting
        self._waiting.clear()

    def has(self, path: Path) -> bool:
        """Whether a picture lies at `path`, or waits to."""
        return path in self._waiting or path.is_file()

    def open(self, path: Path) -> Image.Image:
        """The picture that lies at `path`, or waits to. Raises OSError."""
        return Image.open(io.BytesIO(self._waiting[path]) if path in self._waiting else path)

    def account(self) -> Account:
        """What became of the pictures since this was last asked."""
        written, waiting, lost = ([str(path) for path in paths] for paths in (self._written, self._waiting, self._lost))
        self._written, self._lost = [], []
        return Account(written, waiting, lost, self._reason)

    def _attempt(self, path: Path) -> None:
        try:
            write_whole(path, self._waiting[path])
        except OSError as error:
            self._reason = str(error)
            return
        del self._waiting[path]
        self._written.append(path)

    def _limit(self) -> None:
        """The oldest go where there are too many."""
        while sum(map(len, self._waiting.values())) > KEPT_BYTES:
            path = next(iter(self._waiting))
            del self._waiting[path]
            self._lost.append(path)


def png_of(image: Image.Image, texts: Mapping[str, str], *, compression: int = 6) -> bytes:
    """A whole PNG file with metadata. `compression`: 1 is quickest, 9 smallest."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info, compress_level=compression)
    return file.getvalue()
