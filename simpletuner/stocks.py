"""What a run keeps of its pictures and prompts, where, and how much of it is there already.

Several sets may share a folder, and each kind of item lies there under a recipe of its own: latents, image embeds, masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np

from simpletuner.config.datasets import Filled
from simpletuner.config.run import Run
from simpletuner.data import masks
from simpletuner.data.cache import KEY_DTYPE, Keys, TensorCache
from simpletuner.data.encoding import latent_key, latent_recipe
from simpletuner.data.index import ImageSet, Remembered
from simpletuner.data.keep import MEMORY_BYTES
from simpletuner.data.prompts import prompt_bytes
from simpletuner.data.samples import PictureEncoder, Prompt, Recipe
from simpletuner.estimates import item_bytes
from simpletuner.families.base import ModelFamily
from simpletuner.preflight import by_use
from simpletuner.text_cache import open_store, size

__all__ = ["CacheStock", "Kept", "held_in_memory", "kept_pictures", "picture_stocks", "text_stocks"]

Kind = Literal["pictures", "image embeds", "masks", "prompts"]
Known = Callable[[ImageSet, int], Remembered | None]
"""What is believed of a picture's bytes without reading it."""
MASK_BYTES = 4
"""Of one cell."""


@dataclass(frozen=True)
class Kept:
    """What a run keeps of a set's usable pictures under one recipe."""

    images: ImageSet
    kind: Kind
    recipe: Recipe | None
    """None while the model is not on this machine: then nothing can be looked up."""
    keys: Keys
    """Of the pictures whose bytes are known, each key once."""
    unread: int
    """Pictures whose bytes are not known: nothing of them can be looked up."""
    filled: Filled
    key_of: Callable[[int, bytes], str]
    """(sample, digest of its bytes) -> the key of its item."""

    @property
    def missing(self) -> int:
        """How many pictures are not there, as far as that can be told."""
        held = self._cache.held(self.keys).sum() if self._cache is not None and len(self.keys) else 0
        return self.unread + len(self.keys) - int(held)

    @cached_property
    def _cache(self) -> TensorCache | None:
        """Opened once: that reads the header of every shard."""
        return TensorCache(self.images.cache_dir, self.recipe) if self.recipe is not None else None


def kept_pictures(
    run: Run, family: ModelFamily, sets: Sequence[ImageSet], *, is_here: bool = True, known: Known = ImageSet.remembered
) -> Iterator[Kept]:
    """What is made of all sets, in the order in which training makes it. `is_here`: whether the model is on this machine."""
    for images in sets:
        if images.masks is not None:
            keys = masks.mask_keys(images, family.latent)
            unique = np.unique(keys[images.alive()])
            yield Kept(images, "masks", masks.RECIPE, unique, 0, "before", partial(_at, keys))
    for images in sets:
        yield _encoded(images, "pictures", family.image_encoder(), run.dtypes.latents, is_here, known)
    if (asked := family.image_prompts()) is not None:
        for images in by_use(sets)[0]:
            yield _encoded(images, "image embeds", asked[0], "float32", is_here, known)


def _encoded(images: ImageSet, kind: Kind, encoder: PictureEncoder, dtype: str, is_here: bool, known: Known) -> Kept:
    alive = images.alive().tolist()
    found = [(sample, each.digest) for sample in alive if (each := known(images, sample)) is not None]
    keys = np.unique(np.array([_encoded_key(images, *each) for each in found], KEY_DTYPE))
    recipe = latent_recipe(encoder, dtype) if is_here else None
    return Kept(images, kind, recipe, keys, len(alive) - len(found), images.entry.filled, partial(_encoded_key, images))


def _at(keys: Keys, sample: int, _digest: bytes) -> str:
    return keys[sample].decode()


def _encoded_key(images: ImageSet, sample: int, digest: bytes) -> str:
    return latent_key(digest, images.place(sample))


# counted


@dataclass(frozen=True)
class CacheStock:
    """What a cache holds of what the run needs."""

    kind: Kind
    name: str
    """"pictures of <set>", "masks of <set>", "prompts (<encoder>)"."""
    folder: str
    filled: Filled
    needed: int
    missing: int
    """What has still to be written; 0 where nothing is kept."""
    item_bytes: int
    """Of one item, at most."""

    @property
    def missing_bytes(self) -> int:
        """At most, still to be written."""
        return self.missing * self.item_bytes

    @property
    def text(self) -> str:
        """One line: "pictures of cats: 1,204, 37 must be encoded; 394.0 KiB each at most, 463.3 MiB in all, ..."."""
        if self.filled == "never":
            return f"{self.name}: {self.needed:,}, encoded while training and not cached"
        todo = {"before": "must be encoded", "ondemand": "are encoded while training, when they are first used"}[self.filled]
        todo = "must be read" if self.kind == "masks" else todo
        rest = f"{self.missing:,} {todo}" if self.missing else "all are there"
        each = f"{size(self.item_bytes)} each at most, {size(self.needed * self.item_bytes)} in all"
        return f"{self.name}: {self.needed:,}, {rest}; {each}, {size(self.missing_bytes)} to be written"


def picture_stocks(run: Run, family: ModelFamily, sets: Sequence[ImageSet], *, is_here: bool) -> Iterator[CacheStock]:
    """While the model is not here, what made a cache cannot be told: then all that is encoded counts as missing."""
    latent, asked = family.latent, family.image_prompts()
    embed_bytes = item_bytes(asked[0]) if asked is not None else 0
    cell_bytes = latent.channels * (4 if run.dtypes.latents == "float32" else 2)
    for kept in kept_pictures(run, family, sets, is_here=is_here):
        images, alive = kept.images, kept.images.alive()
        grids = [latent.grid(*images.buckets[bucket]) for bucket in set(images.bucket_ids[alive].tolist())]
        cells = max(rows * columns for rows, columns in grids)
        each = {"pictures": cells * cell_bytes, "masks": cells * MASK_BYTES, "image embeds": embed_bytes}[kept.kind]
        missing = 0 if kept.filled == "never" else kept.missing
        name = f"{kept.kind} of {images.entry.id}"
        yield CacheStock(kept.kind, name, str(images.cache_dir), kept.filled, len(alive), missing, each)


def text_stocks(run: Run, family: ModelFamily, prompts: Sequence[Prompt], *, is_here: bool) -> Iterator[CacheStock]:
    """Of each text encoder's embeds, likewise."""
    store = open_store(run, family) if is_here else None
    filled, folder = run.text_embeds.filled, run.text_embeds.cache_dir
    assert folder is not None, "config/derive.py fills in cache_dir"
    for number, encoder in enumerate(family.text_encoders(), start=1):
        name = f"text encoder {number}" if store is None else encoder.recipe.name
        missing = len(prompts) if store is None else len(store.missing(encoder.recipe, prompts))
        missing = 0 if filled == "never" else missing
        yield CacheStock("prompts", f"prompts ({name})", folder, filled, len(prompts), missing, prompt_bytes(encoder))


def held_in_memory(stocks: Sequence[CacheStock]) -> int:
    """Bytes of ordinary memory for what is encoded while training and kept nowhere else, at most (`data/keep.py`)."""
    sizes: dict[str, int] = {}
    for stock in stocks:
        if stock.filled == "never":
            keep = stock.name if stock.kind == "prompts" else stock.kind  # the sets share one, each text encoder has its own
            sizes[keep] = sizes.get(keep, 0) + stock.needed * stock.item_bytes
    return sum(min(MEMORY_BYTES, each) for each in sizes.values())
