"""Masks: which one belongs to which picture, and how it weighs the cells of the picture's latents.

A mask has its picture's path and name within its own folder, whatever the endings. It takes its picture's place, crop and all,
is reduced to the grid of the latents by area and kept in the set's cache folder, in a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from simpletuner.config.datasets import ConditioningDataset
from simpletuner.data.cache import KEY_DTYPE, Item, Keys, TensorCache, item_key
from simpletuner.data.discovery import CANNOT_OPEN
from simpletuner.data.ledger import Note
from simpletuner.data.pixels import Unreadable, read_mask
from simpletuner.data.ranks import Ranks, together
from simpletuner.data.samples import LatentSpec, Place, Recipe
from simpletuner.data.stores.folder import search
from simpletuner.errors import DataError
from simpletuner.events import Notice, Progress, Tell

if TYPE_CHECKING:
    from simpletuner.data.index import ImageSet

__all__ = ["NO_MASK", "RECIPE", "SHARD_ITEMS", "MaskStore", "Masks", "fill_masks", "find_masks", "mask_keys"]

RECIPE = Recipe("mask", {"channel": "first", "resize": "torch uint8 lanczos antialias, then area"})
NO_MASK = "no mask"
NAMED = 10
"""Files named in one line."""
AT_ONCE = 64
"""Masks that wait in memory."""
READERS = 8
SHARD_ITEMS = 16 * AT_ONCE
"""Masks in one shard of the cache."""


class Mask(NamedTuple):
    """A mask's file, and what tells whether it has changed."""

    file: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Masks:
    """The masks of a folder by their paths without endings."""

    id: str
    root: Path
    by_stem: dict[str, Mask]

    def of(self, file: str) -> Mask | None:
        """The mask of a picture, by its path within the set."""
        return self.by_stem.get(_stem(file))

    def read(self, mask: Mask) -> bytes:
        """The bytes of its file. Raises Unreadable."""
        try:
            return (self.root / mask.file).read_bytes()
        except OSError as error:
            raise Unreadable(CANNOT_OPEN, error.strerror or str(error)) from error

    def without_picture(self, files: Iterator[str]) -> list[Note]:
        """What the ledger of a set should say of masks that none of its pictures has."""
        taken = {_stem(file) for file in files}
        idle = [mask.file for stem, mask in self.by_stem.items() if stem not in taken]
        return [Note(file, f"a mask of {self.id} without a picture") for file in idle]


@dataclass(frozen=True, eq=False)
class MaskStore:
    """The masks of one set, by sample."""

    cache: TensorCache
    keys: Keys

    def get(self, sample: int) -> Tensor:
        """How much each cell counts: (1, H, W) float32 in [0, 1]."""
        return self.cache.get(self.keys[sample].decode())["mask"]


def find_masks(entry: ConditioningDataset) -> Masks:
    """Search a folder of masks. Raises DataError if it cannot be, or if two masks are one picture's."""
    root = Path(entry.instance_data_dir).expanduser().resolve()
    listing = search(str(root))
    if listing.closed:
        folder, why = next(iter(listing.closed.items()))
        raise DataError(f"Dataset `{entry.id}`: the folder {root / folder} cannot be searched: {why}.")
    by_stem: dict[str, Mask] = {}
    for file, size, mtime_ns in zip(listing.files, listing.sizes.tolist(), listing.times.tolist(), strict=True):
        other = by_stem.setdefault(_stem(file), Mask(file, size, mtime_ns))
        if other.file != file:
            what = f"Dataset `{entry.id}`: {other.file} and {file} are masks of the same picture."
            raise DataError(what, "they differ in their endings alone.", "remove one of them.")
    return Masks(entry.id, root, by_stem)


def fill_masks(images: ImageSet, latent: LatentSpec, *, ranks: Ranks, tell: Tell) -> MaskStore | None:
    """Reduce the masks that are not in the cache yet, all ranks together. None for a set without masks.

    A picture whose mask is unreadable or has another shape is left out. Raises DataError if none is left.
    """
    masks = images.masks
    if masks is None:
        return None
    cache = TensorCache(images.cache_dir, RECIPE)
    together(ranks, lambda: cache.set_aside(tell) if ranks.rank == 0 else None)
    keys = mask_keys(images, latent)
    alive = images.alive()
    todo = alive[~cache.held(keys[alive])][ranks.rank :: ranks.ranks]
    shares = together(ranks, lambda: _fill(images, masks, latent, cache, keys, todo, tell))
    faults = sorted(tuple(fault) for share in shares for fault in share)
    for sample, reason, detail in faults:
        images.leave_out(sample, f"mask {reason}", detail)
    cache.refresh()
    store = MaskStore(cache, keys)
    _tell(images, store, [(sample, f"mask {reason}") for sample, reason, _ in faults], tell)
    images.check_usable()
    return store


def mask_keys(images: ImageSet, latent: LatentSpec) -> Keys:
    """Under which the masks of a set that has them are kept, by sample; empty for one that is left out."""
    assert images.masks is not None, "the set has masks"
    keys = np.zeros(len(images), KEY_DTYPE)
    for sample in images.alive().tolist():
        mask = images.masks.of(images.file(sample))
        assert mask is not None, "pictures without a mask were left out when the set was opened"
        keys[sample] = _key(mask, images.place(sample), latent).encode()
    return keys


def _fill(
    images: ImageSet,
    masks: Masks,
    latent: LatentSpec,
    cache: TensorCache,
    keys: Keys,
    todo: NDArray[np.int64],
    tell: Tell,
) -> list[list[Any]]:
    """This rank's share; the masks that cannot be used: (sample, reason, detail)."""
    faults: list[list[Any]] = []

    def made(sample: int) -> list[Item]:
        mask = masks.of(images.file(sample))
        assert mask is not None
        try:
            return [(keys[sample].decode(), {"mask": _reduced(masks.read(mask), images.place(sample), latent)})]
        except Unreadable as fault:
            faults.append([sample, fault.reason, f"{mask.file}: {fault.detail}"])
            return []

    if not len(todo):
        return faults
    task = f"reading masks of {images.entry.id}"
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-masks") as pool, cache.writer(SHARD_ITEMS) as writer:
        for start in range(0, len(todo), AT_ONCE):
            tell(Progress(task, start, len(todo), "masks"))
            writer.add([item for items in pool.map(made, todo[start : start + AT_ONCE].tolist()) for item in items])
    tell(Progress(task, len(todo), len(todo), "masks"))
    return faults


def _reduced(raw: bytes, place: Place, latent: LatentSpec) -> Tensor:
    return interpolate(read_mask(raw, place)[None], size=latent.grid(*place.target_WH), mode="area")[0]


def _tell(images: ImageSet, store: MaskStore, left_out: Sequence[tuple[int, str]], tell: Tell) -> None:
    empty = [sample for sample in images.alive().tolist() if not store.get(sample).any()]
    for sample in empty:
        images.note(sample, "its mask is black where the picture is trained: nothing is learnt of it")
    if left_out:
        tell(Notice(f"{images.entry.id}: left out: {_named([f'{images.file(s)} ({why})' for s, why in left_out])}", "warning"))
    if empty:
        names = _named([images.file(sample) for sample in empty])
        tell(Notice(f"{images.entry.id}: these count for nothing, since their masks are black there: {names}", "warning"))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _key(mask: Mask, place: Place, latent: LatentSpec) -> str:
    return item_key(*mask, place.original_WH, place.resized_WH, place.corner_XY, place.target_WH, latent.grid(*place.target_WH))


def _stem(file: str) -> str:
    """A path without its ending, where the last name has one."""
    folder, slash, name = file.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"
