"""One shard of a cache: a safetensors file in which every item's tensors lie together, so that an item is one read.

The library reads these files, but cannot write them: it orders tensors by dtype over the whole file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "ShardError", "Stored", "read_header", "serialised", "shard_name"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """Where a tensor lies in its item."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    numel: int
    begin: int
    end: int


Layout = tuple[Stored, ...]
"""The tensors of an item. Nearly all items of a cache share a few layouts, so the index holds a number for it."""


class ShardError(Exception):
    """A file that is not the whole shard its name promises."""


def shard_name(keys: Iterable[str]) -> str:
    """The file's name, a hash of its keys."""
    return f"shard-{hashlib.blake2b(''.join(sorted(keys)).encode(), digest_size=8).hexdigest()}.safetensors"


def serialised(items: Mapping[str, Mapping[str, Tensor]]) -> list[Any]:
    """The safetensors file of some items, in pieces.

    Written here and not by the library, which orders tensors by dtype: an item's tensors must lie together to be one read.
    """
    header, pieces, begin = {}, [], 0
    for key, tensors in items.items():
        # widest numbers first, so that every tensor of an item is aligned
        for name, tensor in sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0])):
            piece = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            end = begin + piece.nbytes
            header[f"{key}.{name}"] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            pieces.append(piece)
            begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def read_header(path: Path) -> tuple[list[str], list[Layout], list[int]]:
    """Keys, layouts and offsets in the file of a shard's items. Raises `ShardError` unless the file is whole."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ShardError(f"{size} bytes are less than its header")
        text = file.read(length)
    items: dict[str, list[Stored]] = {}
    offsets: dict[str, int] = {}
    position = 0
    try:
        for full_name, entry in sorted(json.loads(text).items(), key=lambda named: named[1]["data_offsets"]):
            key, _, name = full_name.partition(".")
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            first, numel = offsets.setdefault(key, begin), math.prod(shape)
            if begin != position or end - begin != dtype.itemsize * numel:
                raise ShardError("its tensors do not follow one another")
            items.setdefault(key, []).append(Stored(name, dtype, shape, numel, begin - first, end - first))
            position = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"its header is unreadable: {error}") from error
    start = 8 + length
    if start + position != size:
        raise ShardError(f"{size} bytes where its header says {start + position}")
    if shard_name(items) != path.name:
        raise ShardError("its keys are not those of its name")
    return list(items), [tuple(tensors) for tensors in items.values()], [start + offset for offset in offsets.values()]
