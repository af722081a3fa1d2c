"""The manifest: what is known of every picture of a set, in columns, on disk as safetensors.

A million pictures cost a few hundred bytes each, not Python objects: text is one blob with offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from simpletuner.data.whole import write_whole

__all__ = ["UNKNOWN", "Ints", "Manifest", "Remembered", "Texts", "load_manifest", "save_manifest"]

VERSION = "2"
UNKNOWN = -1
"""Size of a file that is not there or could not be asked: never a real one's, so the file is looked at again."""

AT_ONCE = 4096
"""Rows that become Python objects at a time: those of a million would fill a gigabyte."""

Ints = NDArray[np.int64]
Words = NDArray[np.bytes_]


class Remembered(NamedTuple):
    """What was learned when a picture was last read for encoding."""

    digest: bytes
    """Of the file's bytes."""
    latent_key: str
    """Of its latents in the cache."""
    recipe: str
    """Digest of the recipe that made them."""


class Texts(NamedTuple):
    """A column of strings: one blob of UTF-8, string i from offsets[i] to offsets[i + 1]."""

    blob: NDArray[np.uint8]
    offsets: Ints

    @classmethod
    def of(cls, strings: Iterable[str]) -> Texts:
        """Undecodable bytes of file names (Python keeps them as lone surrogates) survive."""
        pieces = [string.encode("utf-8", "surrogateescape") for string in strings]
        offsets = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return cls(np.frombuffer(b"".join(pieces), np.uint8), offsets)

    def at(self, row: int) -> str:
        """String number `row`."""
        return self.blob[self.offsets[row] : self.offsets[row + 1]].tobytes().decode("utf-8", "surrogateescape")

    def strings(self) -> list[str]:
        """All of them."""
        return self.part(0, len(self.offsets) - 1)

    def part(self, first: int, end: int) -> list[str]:
        """Strings `first` up to `end`."""
        ends = self.offsets[first : end + 1]
        blob, places = self.blob[ends[0] : ends[-1]].tobytes(), (ends - ends[0]).tolist()
        return [blob[begin:stop].decode("utf-8", "surrogateescape") for begin, stop in pairwise(places)]


@dataclass
class Manifest:
    """Columns over the pictures found in one store, in the order of their paths."""

    root: str
    """What names the store; what was learned of another's files is not believed."""
    captions_from: str
    """Where `captions` are from: "" (none were wanted), "textfile", or what names a table."""
    files: Texts
    """Paths within the store, with `/`."""
    sizes: Ints
    times: Ints
    """mtime in ns, or what a store has instead. With the size it tells whether a file is still the one that was measured."""
    edges: NDArray[np.int32]
    """(N, 2): width and height after the EXIF turn; zeros for a file that cannot be read."""
    caption_sizes: Ints
    """Of the caption file beside the picture, UNKNOWN where there is none."""
    caption_times: Ints
    captions: Texts
    """What it says, or the table."""
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Row -> (reason, detail) of a file that cannot be read."""
    digests: Words = field(default_factory=lambda: np.zeros(0, "S32"))
    """In hex; empty for a file never read for encoding."""
    latent_keys: Words = field(default_factory=lambda: np.zeros(0, "S32"))
    recipes: Words = field(default_factory=lambda: np.zeros(0, "S16"))
    is_current: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Whether what was learned belongs to the file as it is now, not to what it was before."""

    def __post_init__(self) -> None:
        for name in ("digests", "latent_keys", "recipes", "is_current"):
            if len(getattr(self, name)) != len(self):
                setattr(self, name, np.zeros(len(self), getattr(self, name).dtype))

    @classmethod
    def empty(cls, root: str) -> Manifest:
        """Of a store never searched."""
        none = np.zeros(0, np.int64)
        return cls(root, "", Texts.of(()), none, none, np.zeros((0, 2), np.int32), none, none, Texts.of(()))

    def __len__(self) -> int:
        return len(self.sizes)

    def pictures(self) -> Iterator[tuple[str, tuple[int, int], str]]:
        """Of each row in turn: path, (width, height), text of its captions."""
        for first in range(0, len(self), AT_ONCE):
            end = min(first + AT_ONCE, len(self))
            edges_WH = map(tuple, self.edges[first:end].tolist())
            yield from zip(self.files.part(first, end), edges_WH, self.captions.part(first, end), strict=True)

    def remembered(self, row: int) -> Remembered | None:
        """What was learned of this picture or, see `is_current`, of what the file held before."""
        if not self.digests[row]:
            return None
        digest, latent_key, recipe = self.digests[row], self.latent_keys[row], self.recipes[row]
        return Remembered(bytes.fromhex(digest.decode()), latent_key.decode(), recipe.decode())

    def remember(self, row: int, learned: Remembered) -> None:
        """Keep what was learned of the file as it is now."""
        words = (learned.digest.hex(), learned.latent_key, learned.recipe)
        for column, word in zip((self.digests, self.latent_keys, self.recipes), words, strict=True):
            letters = word.encode("ascii")
            assert 0 < len(letters) <= column.dtype.itemsize, f"{word!r} does not fit the manifest"
            column[row] = letters
        self.is_current[row] = True


TEXTS = ("files", "captions")
NUMBERS = ("sizes", "times", "edges", "caption_sizes", "caption_times", "is_current")
WORDS = ("digests", "latent_keys", "recipes")


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write it, whole or not at all."""
    texts = {name: getattr(manifest, name) for name in TEXTS}
    texts["fault_reasons"] = Texts.of(reason for reason, _ in manifest.faults.values())
    texts["fault_details"] = Texts.of(detail for _, detail in manifest.faults.values())
    columns = {name: getattr(manifest, name) for name in NUMBERS}
    columns["fault_rows"] = np.fromiter(manifest.faults, np.int64, len(manifest.faults))
    for name in WORDS:
        words = getattr(manifest, name)
        columns[name] = words.view(np.uint8).reshape(len(words), words.dtype.itemsize)
    for name, column in texts.items():
        columns |= {f"{name}.blob": column.blob, f"{name}.offsets": column.offsets}
    facts = {"version": VERSION, "root": _hex(manifest.root), "captions_from": _hex(manifest.captions_from)}
    write_whole(path, save(columns, facts))


def load_manifest(path: Path) -> Manifest | None:
    """Read what `save_manifest` wrote; None if there is none, or another version's. Raises SafetensorError if damaged."""
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as file:
        facts = file.metadata() or {}
        if facts.get("version") != VERSION:
            return None
        columns: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name in (*TEXTS, "fault_reasons", "fault_details"):
        columns[name] = Texts(columns.pop(f"{name}.blob"), columns.pop(f"{name}.offsets"))
    for name in WORDS:
        columns[name] = columns[name].view(f"S{columns[name].shape[1]}").reshape(-1)
    rows, reasons, details = (columns.pop(f"fault_{name}") for name in ("rows", "reasons", "details"))
    return Manifest(
        root=_text(facts["root"]),
        captions_from=_text(facts["captions_from"]),
        faults=dict(zip(rows.tolist(), zip(reasons.strings(), details.strings(), strict=True), strict=True)),
        **columns,
    )


def _hex(text: str) -> str:
    """For safetensors' metadata, which takes no undecodable bytes."""
    return text.encode("utf-8", "surrogateescape").hex()


def _text(digits: str) -> str:
    return bytes.fromhex(digits).decode("utf-8", "surrogateescape")
