"""What is encoded while training, kept: in a bounded part of memory, or in the cache for this run and later ones.

The thread that reads ahead looks here, the loop's own thread adds what it has encoded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from simpletuner.data.cache import Item, ShardWriter, TensorCache

__all__ = ["Fetched", "Keep", "Memory", "OnDisk", "Pending"]

MEMORY_BYTES = 512 * 2**20
"""What a `Memory` holds at most, in the machine's own memory: about a thousand latents of SD3 at 1024 px."""

T = TypeVar("T")


@dataclass(frozen=True)
class Pending(Generic[T]):
    """What a reading thread has made ready. Encoders are called by the loop's own thread alone: which kernels compute, and in
    which precision, is settled for a whole process."""

    finish: Callable[[], T]
    is_ready: bool
    """Whether nothing is left to encode: the reading thread may then finish it itself."""


@dataclass(frozen=True)
class Fetched:
    """The latents of a micro-batch on their way."""

    samples: tuple[int, ...]
    """Those that were asked for, or what stands in for unreadable ones."""
    latents: Pending[list[Tensor]]


class Keep(Protocol):
    """Where encoded items are kept."""

    is_lasting: bool
    """Whether what is here stays here."""

    def has(self, key: str) -> bool:
        """Whether an item is here now."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """An item's tensors, None if it is not here."""

    def put(self, items: Sequence[Item]) -> None:
        """Take what was encoded at once."""


class Memory:
    """The newest items. Those that were encoded at once also leave at once, so that they are encoded as before."""

    is_lasting = False

    def __init__(self, limit_bytes: int = MEMORY_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._units: OrderedDict[int, Sequence[Item]] = OrderedDict()
        self._unit_of: dict[str, int] = {}
        self._items: dict[str, Mapping[str, Tensor]] = {}
        self._next = 0
        self._lock = threading.Lock()

    def has(self, key: str) -> bool:
        """Whether an item is here now."""
        return key in self._items

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """An item's tensors, None if it is not here. What is asked for is not soon forgotten."""
        with self._lock:
            if (item := self._items.get(key)) is not None:
                self._units.move_to_end(self._unit_of[key])
            return item

    def put(self, items: Sequence[Item]) -> None:
        """Take what was encoded at once; forget the oldest where there is no room."""
        with self._lock:
            items = [(key, tensors) for key, tensors in items if key not in self._items]
            if not items:
                return
            self._units[self._next] = items
            self._items.update(items)
            self._unit_of.update(dict.fromkeys((key for key, _ in items), self._next))
            self._bytes += _bytes(items)
            self._next += 1
            while self._bytes > self._limit_bytes and len(self._units) > 1:
                _, oldest = self._units.popitem(last=False)
                self._bytes -= _bytes(oldest)
                for key, _ in oldest:
                    del self._items[key], self._unit_of[key]


class OnDisk:
    """The cache, and what is on its way there. Several processes may make the same item: it is the same on disk."""

    is_lasting = True

    def __init__(self, cache: TensorCache, writer: ShardWriter, *, is_shared: bool) -> None:
        self._cache = cache
        self._writer = writer
        self._is_shared = is_shared
        """Whether other processes write there as well."""
        self._waiting: dict[str, Mapping[str, Tensor]] = {}
        self._lock = threading.Lock()

    def has(self, key: str) -> bool:
        """Whether an item is here."""
        return key in self._waiting or self._cache.has(key)

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """An item's tensors, None if it is not here."""
        with self._lock:
            if (item := self._waiting.get(key)) is not None:
                return item
        return self._cache.get(key) if self._cache.has(key) else None

    def put(self, items: Sequence[Item]) -> None:
        """Take what was encoded at once, to be written."""
        with self._lock:
            self._waiting.update(items)
        self._writer.add(items)
        if self._is_shared:
            self._cache.refresh()
        with self._lock:
            self._waiting = {key: tensors for key, tensors in self._waiting.items() if not self._cache.has(key)}


def _bytes(items: Sequence[Item]) -> int:
    return sum(tensor.nbytes for _, tensors in items for tensor in tensors.values())
