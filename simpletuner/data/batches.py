"""Batches in memory: what the plan says, read ahead of the training loop from the caches, or from pictures to be encoded.

Which caption is told, and whether it is dropped, is drawn here, keyed by the micro-batch and not by any generator's state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from simpletuner.data.keep import Fetched, Pending
from simpletuner.data.masks import MaskStore
from simpletuner.data.plan import Dealt, Stream
from simpletuner.data.prompts import UNCOND
from simpletuner.data.ranks import Ranks
from simpletuner.data.samples import Batch, Cond, Cursor, Embeds, MicroBatch, Place, Prompt, draw_seed

if TYPE_CHECKING:
    from simpletuner.data.index import ImageSet

__all__ = ["Batches", "Collate", "Group", "ImagePrompts", "Latents", "Prompts"]

Collate = Callable[[list[Embeds], list[Place]], Cond]

AHEAD = 3
"""Groups that wait in memory."""


class Latents(Protocol):
    """The latents of one set: a cache's (`LatentStore`), or those of an encoder that stays lent (`LiveLatents`)."""

    def fetch(self, samples: Sequence[int]) -> Fetched:
        """Those of some samples, in the reading thread."""


class Prompts(Protocol):
    """The embeds of all prompts: a cache's (`PromptStore`), or those of encoders that stay lent (`LivePrompts`)."""

    def fetch(self, prompts: Sequence[Prompt]) -> Pending[list[Embeds]]:
        """Those of some prompts, in the reading thread."""


@dataclass(frozen=True)
class ImagePrompts:
    """What the denoiser is told of the trained pictures themselves."""

    stores: Sequence[Latents]
    """One for each set."""
    share: float
    """Of the samples; the others are told nothing of it."""


@dataclass(frozen=True)
class Group:
    """This rank's batches of one optimiser step."""

    batches: list[Batch]
    after: Cursor
    """Where the stream stands when the step is done."""


class Batches:
    """The stream as tensors, for one rank."""

    def __init__(
        self,
        stream: Stream,
        sets: Sequence[ImageSet],
        latents: Sequence[Latents],
        prompts: Prompts,
        collate: Collate,
        *,
        image_prompts: ImagePrompts | None = None,
        masks: Sequence[MaskStore | None] | None = None,
        masked: float = 1.0,
        seed: int,
        dropout: float,
        ranks: Ranks,
        accumulation: int,
    ) -> None:
        assert len(stream.sets) == len(sets) == len(latents), "one plan and one store for each set"
        self._stream = stream
        self._sets = sets
        self._latents = latents
        self._prompts = prompts
        self._collate = collate
        self._image_prompts = image_prompts
        self._masks = masks or [None] * len(sets)
        self._masked = masked
        """Share of the samples that are trained by their masks, where they have them."""
        self._seed = seed
        self._dropout = dropout
        self._ranks = ranks
        self._accumulation = accumulation

    def groups(self, cursor: Cursor) -> Generator[Group, None, None]:
        """Step after step from `cursor` on, while the stream has more. A thread reads ahead; closing the generator ends it."""
        ranks = self._ranks
        dealt = self._stream.groups(cursor, rank=ranks.rank, ranks=ranks.ranks, accumulation=self._accumulation)
        thread = ThreadPoolExecutor(1, thread_name_prefix="batches")  # one: it also plans, step after step
        try:
            ahead: deque[Future[Callable[[], Group] | None]] = deque(thread.submit(self._next, dealt) for _ in range(AHEAD))
            while (finish := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(self._next, dealt))
                yield finish()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

    def _next(self, steps: Iterator[Dealt]) -> Callable[[], Group] | None:
        dealt = next(steps, None)
        return None if dealt is None else self._load(dealt)

    def _load(self, dealt: Dealt) -> Callable[[], Group]:
        """In the thread. What it hands back is called by the loop: it encodes what no cache holds."""
        firsts = zip(dealt.micros, dealt.first_slots, strict=True)
        pending = [self._batch(micro, first, dealt.slots) for micro, first in firsts]
        ready = [one.finish() if one.is_ready else one for one in pending]
        return lambda: Group([one if isinstance(one, Batch) else one.finish() for one in ready], dealt.after)

    def _batch(self, micro: MicroBatch, slot: int, slots: int) -> Pending[Batch]:
        images = self._sets[micro.dataset]
        fetched = self._latents[micro.dataset].fetch(micro.ids)
        prompts = [self._prompt(micro, nth, sample) for nth, sample in enumerate(fetched.samples)]
        embeds = self._prompts.fetch(prompts)
        shown = self._shown(micro, fetched.samples)
        places = [images.place(sample) for sample in fetched.samples]
        files = tuple(f"{images.entry.id}/{images.file(sample)}" for sample in fetched.samples)

        mask_B1HW = self._mask(micro, fetched.samples)

        def finish() -> Batch:
            return Batch(
                latents_BCHW=torch.stack(fetched.latents.finish()),
                cond=self._collate(_with_images(embeds.finish(), shown.finish()), places),
                files=files,
                is_regularisation=images.entry.is_regularisation_data,
                micro=micro,
                slot=slot,
                slots=slots,
                mask_B1HW=mask_B1HW,
            )

        return Pending(finish, is_ready=fetched.latents.is_ready and embeds.is_ready and shown.is_ready)

    def _shown(self, micro: MicroBatch, samples: Sequence[int]) -> Pending[dict[int, Tensor]]:
        """What the denoiser is told of the pictures themselves this time, by their places in the micro-batch."""
        if self._image_prompts is None:
            return Pending(dict, is_ready=True)
        words, share = (self._seed, micro.epoch, micro.index), self._image_prompts.share
        drawn = [nth for nth in range(len(samples)) if draw_seed(*words, nth, "image") < share * 2**63]
        images = self._image_prompts.stores[micro.dataset].fetch([samples[nth] for nth in drawn]).latents
        return Pending(lambda: dict(zip(drawn, images.finish(), strict=True)), images.is_ready)

    def _mask(self, micro: MicroBatch, samples: Sequence[int]) -> Tensor | None:
        """The masks of a set that has them; ones for the samples that are trained as a whole this time."""
        masks = self._masks[micro.dataset]
        if masks is None:
            return None
        found = [masks.get(sample) for sample in samples]
        words = (self._seed, micro.epoch, micro.index)
        is_masked = [draw_seed(*words, nth, "mask") < self._masked * 2**63 for nth in range(len(samples))]
        return torch.stack(
            [mask if masked else torch.ones_like(mask) for mask, masked in zip(found, is_masked, strict=True)]
        )  # fmt: skip

    def _prompt(self, micro: MicroBatch, nth: int, sample: int) -> Prompt:
        """What `sample`, the n-th of a micro-batch or its stand-in, is called this time."""
        words = (self._seed, micro.epoch, micro.index, nth)
        if draw_seed(*words, "drop caption") < self._dropout * 2**63:
            return UNCOND
        captions = self._sets[micro.dataset].captions(sample)
        return Prompt(captions[draw_seed(*words, "caption") % len(captions)])


def _with_images(embeds: Sequence[Embeds], shown: Mapping[int, Tensor]) -> list[Embeds]:
    return [{**embed, "image_D": shown[nth]} if nth in shown else embed for nth, embed in enumerate(embeds)]
