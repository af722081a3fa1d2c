"""The words that data, families and training share: what a sample is on its way from a file to a batch.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns,  L tokens,  D width.
Sizes named _WH are (width, height) in pixels. No torch at import: families' files are read by `--help`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Batch",
    "Cond",
    "Cursor",
    "Embeds",
    "LatentSpec",
    "MicroBatch",
    "PictureEncoder",
    "Place",
    "Prompt",
    "Recipe",
    "TextEncoder",
    "draw_seed",
]

Embeds = dict[str, "Tensor"]
"""One encoded prompt, no batch dimension: exactly what is cached."""

Cond = dict[str, "Tensor"]
"""A batch of embeds and whatever else the denoiser is told, batch dimension first."""


@dataclass(frozen=True)
class LatentSpec:
    """The grid of a family's latents, read from the loaded configuration."""

    channels: int
    cell_px: float
    """Pixels along one latent cell (8 for SD3, 32 for Sana, 128/3 for Cascade)."""
    alignment_px: int
    """Bucket edges are multiples of this."""
    native_edge_px: int
    """The edge of the square the model was trained on."""
    longest_aspect: float | None = None
    """Beyond this the model falls apart: buckets longer or taller than it are warned of. None: it is not known to."""
    longest_edge_px: int | None = None
    """The denoiser knows no places beyond: larger buckets and pictures are refused. None: it takes any size."""

    def grid(self, width_px: int, height_px: int) -> tuple[int, int]:
        """(rows, columns) of the latents of a picture of this size."""
        return round(height_px / self.cell_px), round(width_px / self.cell_px)


@dataclass(frozen=True)
class Place:
    """How a picture becomes its bucket's size: resized to `resized_WH`, then cut at `corner_XY` to `target_WH`."""

    original_WH: tuple[int, int]
    resized_WH: tuple[int, int]
    corner_XY: tuple[int, int]
    target_WH: tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A text and the part it plays: `cond` is answered to, `uncond` is led away from (and stands for dropped captions)."""

    text: str
    role: Literal["cond", "uncond"] = "cond"


@dataclass(frozen=True)
class Recipe:
    """What alters *all* items of a cache: encoder and weights fingerprint, dtype, template, lengths, resize filter."""

    name: str
    """Short and safe as a folder's name: `dc-ae`, `gemma`."""
    facts: Mapping[str, Any]
    """JSON-able facts."""

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that name the recipe's folder."""
        text = json.dumps([self.name, dict(self.facts)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class TextEncoder(Protocol):
    """A text encoder on loan. Entering `lent` costs nothing; the first call of what it yields loads the weights."""

    @property
    def recipe(self) -> Recipe:
        """What alters all embeds."""

    def longest(self) -> Embeds:
        """One prompt's embeds at their longest, of zeros: from small files, no weights."""

    def hollow(self) -> nn.Module:
        """The network without its weights, on the meta device: from small files."""

    def rehearse(self, network: nn.Module, size: int) -> Any:
        """What `hollow` gave takes `size` prompts of full length: nothing is computed, so that memory can be counted."""

    @property
    def precision(self) -> str:
        """How its weights are stored while it is lent: "no_change", or a name of the catalogue."""

    def lent(self, device: str) -> AbstractContextManager[Callable[[list[Prompt]], list[Embeds]]]:
        """Yields `encode`: prompts -> embeds on the CPU, one for each. The weights are gone after the block."""


class PictureEncoder(Protocol):
    """Anything that makes a tensor of a picture, on loan like a `TextEncoder`: the image encoder makes latents."""

    @property
    def recipe(self) -> Recipe:
        """What alters all that it makes."""

    def hollow(self) -> nn.Module:
        """The network without its weights, on the meta device: from small files."""

    def rehearse(self, network: nn.Module, pixels_B3HW: Tensor) -> Tensor:
        """What `hollow` gave encodes pixels on the meta device, as `lent` would: nothing is computed."""

    def lent(self, device: str) -> AbstractContextManager[Callable[[Tensor, Sequence[str]], Tensor]]:
        """Yields `encode`: pixels (B, 3, rows, columns) float32 in [-1, 1] -> a tensor (B, ...) float32 on the CPU.

        Each picture's cache key goes along: an encoder that draws at random draws by it, and so the same again.
        """


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its stream: micro-batches `[0, position)` of `epoch` are done, or were passed over."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    """Optimiser steps done: a set may start and end at a step."""


@dataclass(frozen=True)
class MicroBatch:
    """One entry of the stream: samples of one set and one bucket. The same on every rank."""

    dataset: int
    bucket_WH: tuple[int, int]
    ids: tuple[int, ...]
    epoch: int
    index: int
    """Place in the epoch; (epoch, index) keys every random draw of this micro-batch."""


@dataclass
class Batch:
    """A micro-batch in memory, on the CPU until the engine moves it."""

    latents_BCHW: Tensor
    """In the dtype they are stored in: half the bytes on their way to the device."""
    cond: Cond
    files: tuple[str, ...]
    """Where each sample came from, for messages."""
    is_regularisation: bool
    micro: MicroBatch
    slot: int
    """First of this batch's strata among those of the whole optimiser step."""
    slots: int
    """Strata of the whole optimiser step: samples over all ranks and accumulation."""
    mask_B1HW: Tensor | None = None
    """How much each cell of the latents counts, float32 in [0, 1]; None: all alike."""


def draw_seed(*words: int | str) -> int:
    """A seed in [0, 2^63) from words such as (seed, epoch, index, "noise"): the same on every machine and Python."""
    text = json.dumps(words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
