"""What encoding ahead of training and encoding while training do alike: which pictures go together, and what is kept of them.

Both cut the same chunks and so make the same bits: an encoder's last bit depends on how many pictures it is given at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simpletuner.data.cache import Item, item_key
from simpletuner.data.pixels import RESIZE_RECIPE
from simpletuner.data.samples import PictureEncoder, Place, Recipe
from simpletuner.errors import RunError

if TYPE_CHECKING:
    from simpletuner.data.index import ImageSet

__all__ = ["Encode", "Ids", "Spread", "chunks_of", "latent_items", "latent_key", "latent_recipe"]

Encode = Callable[[Tensor, Sequence[str]], Tensor]
Ids = NDArray[np.int64]

SPREAD_SAMPLES = 64
"""Fewer pictures say little about the spread of a channel."""


def latent_recipe(encoder: PictureEncoder, dtype: str) -> Recipe:
    """What alters all latents that are stored as `dtype` ("float16", "float32")."""
    return Recipe(encoder.recipe.name, {**encoder.recipe.facts, "pixels": RESIZE_RECIPE, "stored": dtype})


def latent_key(digest: bytes, place: Place) -> str:
    """What makes a picture's latents its own: its bytes and its place."""
    return item_key(digest.hex(), place.resized_WH, place.corner_XY, place.target_WH)


def chunks_of(bucket_ids: NDArray[np.integer[Any]], size: int) -> list[Ids]:
    """Which samples are encoded at once: `size` of one bucket, or fewer at its end, cut from all of them in their order."""
    order = np.argsort(bucket_ids, kind="stable")
    ends = np.flatnonzero(np.diff(bucket_ids[order])) + 1
    return [
        samples for bucket in np.split(order, ends) for samples in np.split(bucket, range(size, len(bucket), size))
    ]  # fmt: skip


def latent_items(
    images: ImageSet, samples: Sequence[int], keys: Sequence[str], latents_BCHW: Tensor, dtype: torch.dtype
) -> list[Item]:
    """Fresh latents as they are stored, by key. Raises RunError where they are not finite numbers."""
    stored_BCHW = latents_BCHW.to(dtype)
    for sample, latents_CHW in zip(samples, stored_BCHW, strict=True):
        if not latents_CHW.isfinite().all():  # one NaN in training would spoil the weights for good
            raise RunError(
                f"The latents of {images.entry.id}/{images.file(sample)} are not finite.",
                why=f"the image encoder overflowed, or gave more than {dtype} can hold.",
                mend='use the image encoder (VAE) that the model was trained with, or set "mixed_precision" to "no".',
            )
    return [(key, {"latents": latents_CHW}) for key, latents_CHW in zip(keys, stored_BCHW, strict=True)]


class Spread:
    """The standard deviation of each channel over all fresh latents."""

    def __init__(self) -> None:
        self.pictures = 0
        self._cells = 0
        self._sum_C = torch.zeros((), dtype=torch.float64)
        self._squares_C = torch.zeros((), dtype=torch.float64)

    def add(self, latents_BCHW: Tensor) -> None:
        """Take some more in."""
        latents_CN = latents_BCHW.double().transpose(0, 1).flatten(1)
        self.pictures += len(latents_BCHW)
        self._cells += latents_CN.shape[1]
        self._sum_C = self._sum_C + latents_CN.sum(1)
        self._squares_C = self._squares_C + latents_CN.square().sum(1)

    @property
    def is_telling(self) -> bool:
        """Whether there were pictures enough to judge by."""
        return self.pictures >= SPREAD_SAMPLES

    def warning(self, dataset: str) -> str:
        """What looks wrong, or "". A single odd channel is not news: the middle one must be far from 1."""
        if not self.is_telling:
            return ""
        std_C = (self._squares_C / self._cells - (self._sum_C / self._cells).square()).clamp(min=0).sqrt()
        if 0.5 <= float(std_C.median()) <= 2:
            return ""
        low, high = float(std_C.min()), float(std_C.max())
        return (
            f"{dataset}: the standard deviation of the latents' channels is {low:.2g} to {high:.2g}, "
            "where about 1 is expected. Is this the image encoder (VAE) that the model was trained with?"
        )
