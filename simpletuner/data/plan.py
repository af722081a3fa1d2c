"""The stream of micro-batches: a pure function of (seed, epoch, index), the same on every rank, machine and number of ranks.

An epoch is each set's samples shuffled, cut into micro-batches of one bucket and mixed; epochs follow without a seam, so no
remainder is dropped and tiny sets need no special case. Nothing is read here: ids go in, ids come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.samples import Cursor, MicroBatch, draw_seed

__all__ = ["Dealt", "Epoch", "PlanSet", "Stream"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PlanSet:
    """What the plan needs to know of one set of pictures."""

    ids: Ints
    """The usable samples."""
    bucket_ids: NDArray[np.integer[Any]]
    """The bucket of each of `ids`."""
    buckets: Sequence[tuple[int, int]]
    """(width, height) of each bucket."""
    batch_size: int
    repeats: int = 0
    """Extra passes in each epoch."""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.bucket_ids) > 0, "a set without usable samples never gets here"

    @property
    def passes(self) -> int:
        """How often a sample comes in an epoch."""
        return self.repeats + 1

    @property
    def visits(self) -> Ints:
        """Samples an epoch in each bucket, top-ups apart."""
        return np.bincount(self.bucket_ids, minlength=len(self.buckets)) * self.passes

    @property
    def batches(self) -> Ints:
        """Micro-batches an epoch in each bucket."""
        return -(-self.visits // self.batch_size)

    def top_ups(self) -> dict[tuple[int, int], int]:
        """Samples that come once more in each epoch, to fill the last batch of their bucket. Full buckets are not named."""
        missing = self.batches * self.batch_size - self.visits
        return {self.buckets[bucket]: int(missing[bucket]) for bucket in np.flatnonzero(missing).tolist()}


class Epoch:
    """The micro-batches of one epoch, held as integers and made into objects when asked for."""

    def __init__(self, number: int, sets: Sequence[PlanSet], seed: int) -> None:
        self.number = number
        self._sets = sets
        cut = [_cut(plan, draw_seed(seed, number, dataset, "samples")) for dataset, plan in enumerate(sets)]
        self._buckets = [buckets for buckets, _ in cut]
        self._tables = [table for _, table in cut]
        lengths = [len(table) for table in self._tables]
        order = _shuffled((sum(lengths),), draw_seed(seed, number, "mix"))
        self._datasets = np.repeat(np.arange(len(sets)), lengths)[order]
        self._rows = np.concatenate([np.arange(length) for length in lengths])[order]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> MicroBatch:
        dataset, row = int(self._datasets[index]), int(self._rows[index])
        return MicroBatch(
            dataset=dataset,
            bucket_WH=self._sets[dataset].buckets[self._buckets[dataset][row]],
            ids=tuple(self._tables[dataset][row].tolist()),
            epoch=self.number,
            index=index,
        )


@dataclass(frozen=True)
class Dealt:
    """One rank's part of one optimiser step."""

    micros: tuple[MicroBatch, ...]
    first_slots: tuple[int, ...]
    """For each micro-batch, the first of its strata among those of the whole step."""
    slots: int
    """Samples of the whole step, over all ranks and accumulation."""
    after: Cursor
    """Where the stream stands when the step is done."""


class Stream:
    """All epochs, one after another, without end."""

    def __init__(self, sets: Sequence[PlanSet], seed: int) -> None:
        assert sets, "a run has at least one set"
        self.sets = tuple(sets)
        self.seed = seed
        self.epoch_length = sum(int(plan.batches.sum()) for plan in self.sets)
        """Micro-batches in an epoch."""

    def epoch(self, number: int) -> Epoch:
        """The micro-batches of epoch `number`, from 0."""
        return Epoch(number, self.sets, self.seed)

    def micro_batches(self, cursor: Cursor) -> Iterator[MicroBatch]:
        """The whole stream from `cursor` on."""
        number, position = cursor.epoch, cursor.position
        while True:
            epoch = self.epoch(number)
            for index in range(position, len(epoch)):
                yield epoch[index]
            number, position = number + 1, 0

    def groups(self, cursor: Cursor, *, rank: int, ranks: int, accumulation: int) -> Iterator[Dealt]:
        """Step after step, the micro-batches of `rank`: every `ranks`-th of the next `ranks` x `accumulation`."""
        micros = self.micro_batches(cursor)
        while True:
            step = [next(micros) for _ in range(ranks * accumulation)]
            ends = np.cumsum([len(micro.ids) for micro in step]).tolist()
            firsts = [0, *ends[:-1]]
            yield Dealt(tuple(step[rank::ranks]), tuple(firsts[rank::ranks]), ends[-1], self._after(step[-1]))

    def _after(self, micro: MicroBatch) -> Cursor:
        last = micro.index + 1 == self.epoch_length
        return Cursor(micro.epoch + 1, 0) if last else Cursor(micro.epoch, micro.index + 1)


def _shuffled(shape: tuple[int, ...], seed: int) -> Ints:
    """Permutations of the last axis' indices, one for each row.

    Raw generator words and a stable sort: numpy promises those for good, the results of `Generator.permutation` it does not.
    """
    words = np.random.PCG64(seed).random_raw(math.prod(shape))
    return np.argsort(words.reshape(shape), axis=-1, kind="stable")


def _cut(plan: PlanSet, seed: int) -> tuple[Ints, Ints]:
    """The bucket of each micro-batch of a set, and its sample ids as rows (micro-batch, batch size).

    The last row of a bucket is filled up with the bucket's first samples of this epoch, round and round if it is smaller.
    """
    passes = _shuffled((plan.passes, len(plan.ids)), seed).ravel()
    by_bucket = passes[np.argsort(plan.bucket_ids[passes], kind="stable")]
    visits, batches = plan.visits, plan.batches
    starts = np.cumsum(visits) - visits
    buckets = np.repeat(np.arange(len(batches)), batches)
    nth = np.arange(len(buckets)) - np.repeat(np.cumsum(batches) - batches, batches)
    within = nth[:, None] * plan.batch_size + np.arange(plan.batch_size)
    places = starts[buckets][:, None] + within % visits[buckets][:, None]
    return buckets, plan.ids[by_bucket[places]]
