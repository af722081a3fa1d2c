"""Memory by counting: the bytes of every tensor storage that lives, and the most that did at one time.

Exact and the same on every run, since nothing is sampled: an operator's results are counted when it returns, a storage is taken
off when it dies. What a kernel needs only while it runs (a convolution's workspace) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakBytes", "stored_bytes"]


class PeakBytes(TorchDispatchMode):
    """Within its block: how many bytes were allocated and are alive, now and at most. Tensors from before do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view or a result in place lies in a storage that was there before.
            if isinstance(leaf, Tensor) and _key(leaf) not in before:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._known:
            return
        size = storage.nbytes()

        def died(_reference: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


def _key(tensor: Tensor) -> int:
    """The storage itself, not where its bytes lie: an empty one has no place."""
    return tensor.untyped_storage()._cdata


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that these tensors lie in, each counted once."""
    storages = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
