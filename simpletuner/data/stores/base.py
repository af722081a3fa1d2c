"""What a store is: the place where a set's pictures are kept, and the one way in which everything else reads them.

A store lists its pictures, measures one from its header and reads the bytes of a file. What is used of them is decided in
`index.py`; a store that knows captions or sizes from a table says so in its listing, and nobody opens a file for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.geometry import WH
from simpletuner.data.manifest import UNKNOWN, Ints, Texts
from simpletuner.events import Tell

__all__ = ["ENDINGS", "NO_FILE", "READABLE", "Files", "Listing", "Stamp", "Store", "in_order", "kind_of"]

READABLE = (
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .avif .avifs .jp2 .j2k .jpf .jpx .jpc .ppm .pgm .pbm .pnm .qoi"
)
ENDINGS = frozenset([*READABLE.split(), ".heic", ".heif", ".jxl"])
"""Of files that count as found. The last three cannot be read: so the ledger tells of them, rather than nobody."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stamp(NamedTuple):
    """What tells whether a file has changed."""

    size: int
    time: int
    """mtime in ns; where a store has no such thing, a number that changes with the file's bytes."""


NO_FILE = Stamp(UNKNOWN, 0)


@dataclass
class Listing:
    """What a store holds: paths within it, with `/`. Columns have a row for each of `files`."""

    files: Sequence[str]
    """Of the pictures, in the order of samples."""
    sizes: Ints
    times: Ints
    texts: dict[str, Stamp] = field(default_factory=dict)
    """Caption files, by their paths."""
    closed: dict[str, str] = field(default_factory=dict)
    """Folders that could not be searched ("" is the first of all), and why."""
    captions: Texts | None = None
    """Known from a table, alternatives apart by `captions.APART`. None: in caption files, if anywhere."""
    edges: NDArray[np.int32] | None = None
    """(N, 2): width and height, known from a table; zeros where it does not say. None: in headers."""
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Row -> (reason, detail) of what the store knows to be no use. Such a row's size must be UNKNOWN."""
    notes: dict[str, str] = field(default_factory=dict)
    """What else the ledger should say of a file."""


class Store(Protocol):
    """Where the pictures of one set are kept. Safe to use from several threads at once."""

    @property
    def root(self) -> str:
        """What names it, to people too; what was learned of another store's pictures is not believed."""

    @property
    def key(self) -> str:
        """The dataset's key that says where it is."""

    @property
    def in_flight(self) -> int:
        """Reads that should be under way at once. 1: a read waits for nothing, so they are made one after another."""

    @property
    def captions_from(self) -> str:
        """What names the table that its listing has captions from; "" if it has none."""

    def listing(self, tell: Tell) -> Listing:
        """What is there now. Raises DataError if that cannot be told at all."""

    def measure(self, file: str) -> WH:
        """(width, height) of a picture as it stands upright, from its header. Raises Unreadable or OSError."""

    def read(self, file: str) -> bytes:
        """The bytes of a picture or a caption file. Raises Unreadable or OSError."""


class Files:
    """Collects what a search finds, in any order, into a listing sorted by path."""

    def __init__(self) -> None:
        self._pictures: list[str] = []
        self._stamps: list[int] = []
        self._texts: dict[str, Stamp] = {}
        self.closed: dict[str, str] = {}

    def add(self, file: str, kind: str, stamp: Stamp) -> None:
        """Note a file of this kind, as `kind_of` calls it: a picture or a caption file; anything else is passed over."""
        if kind == ".txt":
            self._texts[file] = stamp
        elif kind:
            self._pictures.append(file)
            self._stamps += stamp

    def listing(self) -> Listing:
        """All that was added."""
        order = sorted(range(len(self._pictures)), key=self._pictures.__getitem__)
        stamps_N2 = np.array(self._stamps, np.int64).reshape(-1, 2)[order]
        files = [self._pictures[place] for place in order]
        return Listing(files, stamps_N2[:, 0].copy(), stamps_N2[:, 1].copy(), self._texts, self.closed)


def kind_of(name: str) -> str:
    """The ending of a picture's or a caption file's name, in small letters; "" for any other."""
    _, dot, ending = name.rpartition(".")
    ending = dot + ending.lower()
    return ending if ending in ENDINGS or ending == ".txt" else ""


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map` with up to `threads` calls under way at once; the results come in order, and a bounded number waits."""
    if threads == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="store")
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # no `with`: whoever interrupts would wait for calls that wait
