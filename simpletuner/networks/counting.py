"""Memory by counting: the bytes of every tensor storage that lives, and the most that did at one time.

Exact and the same on every run, since nothing is sampled: an operator's results are counted when it returns, a storage is taken
off when it dies. What a kernel needs only while it runs (a convolution's workspace) is not seen. On the meta device nothing is
computed or stored, and the count is the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakBytes", "on_meta", "stored_bytes"]


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


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, new tensors have shapes and no numbers, and attention keeps what its fused kernels keep.

    Without the second, attention on the meta device is PyTorch's plain one, which stores a number for each pair of tokens: tens
    of gigabytes that no real device spends (torch 2.13).
    """
    with torch.device("meta"), _FusedAttention():
        yield


class _FusedAttention(TorchFunctionMode):
    """Puts the memory of a fused kernel in the place of `scaled_dot_product_attention`; every question is answered with no."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return _Fused.apply(query, key, value)
        if func is Tensor.__bool__:  # transformers asks whether masks are full; nothing was computed that could say so
            return False
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Keeps its three inputs, its answer and one float32 for each query and head, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, answer, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])
