"""Tensors on disk, found by what made them: in `<folder>/<recipe digest>/` lie shards and the `recipe.json` that names it.

A shard is staged, fsynced, renamed and never changed after; several processes may write and a duplicate is harmless, so there
are no locks. What a killed writer left half done is never read, and removed by the next one. What a key means, and what is
still to be made, is left to `prompts.py` and `precompute.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simpletuner.data.samples import Recipe
from simpletuner.data.shards import Layout, ShardError, read_header, serialised, shard_name
from simpletuner.data.whole import remove_leftovers, write_pieces
from simpletuner.errors import RunError, UserError
from simpletuner.events import Notice, Tell

__all__ = ["KEY_DTYPE", "NO_RIGHT", "Item", "Keys", "ShardWriter", "TensorCache", "item_key"]

Item = tuple[str, Mapping[str, Tensor]]
Keys = NDArray[np.bytes_]
KEY_DTYPE = np.dtype("S32")

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
"""A kill may cost no more work than this."""
OPEN_FILES = 32
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What systems say where this user may not write."""


def item_key(*words: Any) -> str:
    """32 hex digits that name an item, from JSON-able words."""
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()


class TensorCache:
    """The items made by one recipe. Opening reads the headers of what is there and changes nothing on disk."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = Path(folder) / recipe.digest
        self._lock = threading.Lock()
        self._files = _OpenFiles(self.folder)
        self._shards: list[str] = []
        self._broken: dict[str, str] = {}
        self._layouts: list[Layout] = []
        self._layout_numbers: dict[Layout, int] = {}
        self._index = _Index.empty()
        self._unsorted: list[_Index] = []
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that any process has written since."""
        if not self.folder.is_dir():
            return
        known = set(self._shards)
        for name in sorted(entry.name for entry in os.scandir(self.folder)):
            if name.startswith("shard-") and name.endswith(".safetensors") and name not in known:
                self._admit(name)

    def set_aside(self, tell: Tell) -> None:
        """Rename damaged shards to `*.broken`, so that their items are made again. For one rank, while nobody writes."""
        for name, reason in self._broken.items():
            path = self.folder / name
            try:
                path.replace(path.with_name(name + ".broken"))
            except FileNotFoundError:  # another run was quicker
                continue
            except OSError as error:
                raise _cannot_write(self.folder, error) from error
            tell(Notice(f"{path} is damaged ({reason}): set aside as {name}.broken, its items are made again.", "warning"))
        self._broken.clear()

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the whole shards."""
        return tuple(self._shards)

    def has(self, key: str) -> bool:
        """Whether an item is there, whole."""
        return self._sorted().row(key) >= 0

    def held(self, keys: Sequence[str] | Keys) -> NDArray[np.bool_]:
        """Which of many items are there."""
        return self._sorted().rows(np.asarray(keys, KEY_DTYPE)) >= 0

    def keys(self) -> list[str]:
        """All items, sorted."""
        return [key.decode() for key in np.unique(self._sorted().keys)]

    def get(self, key: str) -> dict[str, Tensor]:
        """An item's tensors, from one read."""
        index = self._sorted()
        row = index.row(key)
        if row < 0:
            raise KeyError(f"{key} is not in {self.folder}")
        layout = self._layouts[index.layouts[row]]
        size, name = layout[-1].end, self._shards[index.shards[row]]
        try:
            raw = np.empty(size, np.uint8)  # neither zeroed nor copied: half the time of 64 KiB is what the memory takes
            got = self._files.read(name, raw, int(index.offsets[row]))
        except OSError as error:
            raise _lost(self.folder / name, str(error)) from error
        if got < size:
            raise _lost(self.folder / name, "it was cut short while in use")
        return {
            name: torch.frombuffer(raw, dtype=dtype, count=numel, offset=begin).reshape(shape)
            for name, dtype, shape, numel, begin, _ in layout
        }

    @contextmanager
    def writer(self, write_batch_size: int) -> Iterator[ShardWriter]:
        """Takes items and writes them in a thread of its own. What was taken is on disk after the block, failed or not."""
        self._make_folder()
        with ThreadPoolExecutor(1, thread_name_prefix="cache-writer") as thread:
            writer = ShardWriter(self, write_batch_size, thread)
            try:
                yield writer
            finally:
                writer.close()

    def _write(self, items: Sequence[Item]) -> str:
        """Write one shard; return its name."""
        unique = dict(items)
        name = shard_name(unique)
        _stage(self.folder / name, serialised(unique))
        return name

    def _admit(self, name: str) -> None:
        """Add a shard's header to the index, or note why it cannot be."""
        try:
            keys, layouts, offsets = read_header(self.folder / name)
        except FileNotFoundError:  # set aside by another process since the folder was listed
            return
        except OSError as error:
            raise _lost(self.folder / name, str(error)) from error
        except ShardError as damage:
            self._broken[name] = str(damage)
            return
        self._broken.pop(name, None)
        with self._lock:
            numbers = [self._number(layout) for layout in layouts]
            shards = np.full(len(keys), len(self._shards), np.int32)
            self._shards.append(name)
            self._unsorted.append(
                _Index(np.asarray(keys, KEY_DTYPE), shards, np.asarray(numbers, np.int32), np.asarray(offsets, np.int64))
            )

    def _sorted(self) -> _Index:
        """The index, with what came since merged in."""
        with self._lock:
            if self._unsorted:
                self._index = _Index.merged([self._index, *self._unsorted])
                self._unsorted.clear()
            return self._index

    def _number(self, layout: Layout) -> int:
        number = self._layout_numbers.setdefault(layout, len(self._layouts))
        if number == len(self._layouts):
            self._layouts.append(layout)
        return number

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        except OSError as error:
            failure = _cannot_write(self.folder, error)
            if error.errno in NO_RIGHT:  # no encoder is loaded yet: as good as found before any work
                raise UserError(failure.problem.what, failure.problem.why, failure.problem.mend) from error
            raise failure from error
        if not (self.folder / "recipe.json").exists():
            text = json.dumps({"name": self.recipe.name, "facts": dict(self.recipe.facts)}, indent=2, ensure_ascii=False)
            _stage(self.folder / "recipe.json", [text.encode()])


class ShardWriter:
    """Gathers whole encoder batches into shards. One shard is written while the next one fills."""

    def __init__(self, cache: TensorCache, write_batch_size: int, thread: ThreadPoolExecutor) -> None:
        self._cache = cache
        self._limit = write_batch_size
        self._thread = thread
        self._writing: Future[str] | None = None
        self._items: list[Item] = []
        self._bytes = 0
        self._since_s = 0.0

    def add(self, items: Sequence[Item]) -> None:
        """Take one encoder batch, never a part of one: a cache finished after a kill is then the same bit for bit."""
        if not self._items:
            self._since_s = time.monotonic()
        self._items.extend(items)
        self._bytes += sum(tensor.nbytes for _, tensors in items for tensor in tensors.values())
        is_old = time.monotonic() - self._since_s >= SHARD_SECONDS
        if len(self._items) >= self._limit or self._bytes >= SHARD_BYTES or is_old:
            self._flush()

    def close(self) -> None:
        """Return when everything is on disk."""
        self._flush()
        self._settle()

    def _flush(self) -> None:
        self._settle()
        if self._items:
            self._writing = self._thread.submit(self._cache._write, self._items)
            self._items, self._bytes = [], 0

    def _settle(self) -> None:
        """Wait for the shard that is being written; what went wrong with it is raised here."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._cache._admit(writing.result())


class _Index(NamedTuple):
    """Columns, one row an item, sorted by key: 48 bytes an item, no Python object."""

    keys: Keys
    shards: NDArray[np.int32]
    layouts: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def empty(cls) -> _Index:
        return cls(np.empty(0, KEY_DTYPE), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))

    @classmethod
    def merged(cls, parts: Sequence[_Index]) -> _Index:
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))

    def row(self, key: str) -> int:
        """The row of a key, -1 where there is none: what `rows` does for many, without its arrays."""
        name = key.encode()
        row = int(self.keys.searchsorted(np.bytes_(name)))
        return row if row < len(self.keys) and self.keys[row] == name else -1

    def rows(self, keys: Keys) -> NDArray[np.int64]:
        """The row of each key, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        rows = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[rows] == keys, rows, -1)


class _OpenFiles:
    """The last few shards that were read, kept open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self, name: str, memory: NDArray[np.uint8], offset: int) -> int:
        """Fill `memory` from a shard; how many bytes there were."""
        with self._lock:
            descriptor = self._descriptors.pop(name, None)
            if descriptor is None:
                if len(self._descriptors) >= OPEN_FILES:
                    os.close(self._descriptors.popitem(last=False)[1])
                descriptor = os.open(self._folder / name, os.O_RDONLY)
            self._descriptors[name] = descriptor
            return os.preadv(descriptor, [memory.data], offset)


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _stage(path: Path, pieces: Iterable[Any]) -> None:
    try:
        write_pieces(path, pieces)
    except OSError as error:
        raise _cannot_write(path.parent, error) from error


def _cannot_write(folder: Path, error: OSError) -> RunError:
    safe = "then start the same command again. What was cached before is whole and is kept; only the rest is made."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"The disk is full: cannot write to {folder}.", str(error), f"Free some space or move the cache, {safe}"
        )
    if error.errno in NO_RIGHT:
        mend = f"Make the folder writable or choose another, {safe}"
        return RunError(f"No permission to write to {folder}.", str(error), mend)
    return RunError(f"Cannot write to {folder}.", str(error), f"Repair the disk or move the cache, {safe}")


def _lost(path: Path, why: str) -> RunError:
    return RunError(f"Cannot read {path}.", why, "Start the same command again: items that are missing are made again.")
