"""Batches in memory: what the plan says, read from the caches ahead of the training loop.

Which caption is told, and whether it is dropped, is drawn here, keyed by the micro-batch and not by any generator's state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from simpletuner.data.plan import Dealt, Stream
from simpletuner.data.precompute import LatentStore
from simpletuner.data.prompts import UNCOND, PromptStore
from simpletuner.data.ranks import Ranks
from simpletuner.data.samples import Batch, Cond, Cursor, Embeds, MicroBatch, Place, Prompt, draw_seed

if TYPE_CHECKING:
    from simpletuner.data.index import ImageSet

__all__ = ["Batches", "Collate", "Group"]

Collate = Callable[[list[Embeds], list[Place]], Cond]

AHEAD = 3
"""Groups that wait in memory."""


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
        latents: Sequence[LatentStore],
        prompts: PromptStore,
        collate: Collate,
        *,
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
            ahead: deque[Future[Group | None]] = deque(thread.submit(self._next, dealt) for _ in range(AHEAD))
            while (group := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(self._next, dealt))
                yield group
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

    def _next(self, steps: Iterator[Dealt]) -> Group | None:
        dealt = next(steps, None)
        return None if dealt is None else self._load(dealt)

    def _load(self, dealt: Dealt) -> Group:
        firsts = zip(dealt.micros, dealt.first_slots, strict=True)
        return Group([self._batch(micro, first, dealt.slots) for micro, first in firsts], dealt.after)

    def _batch(self, micro: MicroBatch, slot: int, slots: int) -> Batch:
        images, latents = self._sets[micro.dataset], self._latents[micro.dataset]
        embeds = [self._prompts.get(self._prompt(micro, nth)) for nth in range(len(micro.ids))]
        return Batch(
            latents_BCHW=torch.stack([latents.get(sample) for sample in micro.ids]),
            cond=self._collate(embeds, [images.place(sample) for sample in micro.ids]),
            files=tuple(f"{images.entry.id}/{images.file(sample)}" for sample in micro.ids),
            is_regularisation=images.entry.is_regularisation_data,
            micro=micro,
            slot=slot,
            slots=slots,
        )

    def _prompt(self, micro: MicroBatch, nth: int) -> Prompt:
        """What the n-th sample of a micro-batch is called this time."""
        words = (self._seed, micro.epoch, micro.index, nth)
        if draw_seed(*words, "drop caption") < self._dropout * 2**63:
            return UNCOND
        captions = self._sets[micro.dataset].captions(micro.ids[nth])
        return Prompt(captions[draw_seed(*words, "caption") % len(captions)])
