"""The stream of micro-batches: a pure function of (seed, epoch, index), the same on every rank, machine and number of ranks.

An epoch is each set's samples shuffled, cut into micro-batches of one bucket and mixed; epochs follow without a seam, so no
remainder is dropped and tiny sets need no special case. What sets would give before they start or after they end is passed
over. Nothing is read here: ids go in, ids come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.samples import Cursor, MicroBatch, draw_seed

__all__ = ["Dealt", "Epoch", "PlanSet", "Stream"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PlanSet:
    """What the plan needs to know of one set of pictures. Epochs and steps count from 0."""

    ids: Ints
    """The usable samples."""
    bucket_ids: NDArray[np.integer[Any]]
    """The bucket of each of `ids`."""
    buckets: Sequence[tuple[int, int]]
    """(width, height) of each bucket."""
    batch_size: int
    name: str = ""
    """For messages."""
    repeats: int = 0
    """Extra passes in each epoch."""
    probability: float = 1.0
    """Weight among the sets drawn from."""
    first_epoch: int = 0
    """The first that draws from it."""
    end_epoch: float = math.inf
    """The first that no longer does."""
    first_step: int = 0
    """The first optimiser step that draws from it."""
    end_step: float = math.inf
    """The first that no longer does."""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.bucket_ids) > 0, "a set without usable samples never gets here"

    @property
    def passes(self) -> int:
        """How often a sample comes in an epoch."""
        return self.repeats + 1

    def is_in_epoch(self, epoch: int) -> bool:
        """Whether it takes part in an epoch, as far as its epochs say."""
        return self.first_epoch <= epoch < self.end_epoch

    def is_in_step(self, step: int) -> bool:
        """Whether optimiser step `step` may draw from it, as far as its steps say."""
        return self.first_step <= step < self.end_step

    @cached_property
    def length(self) -> int:
        """Micro-batches an epoch."""
        return int(self.batches.sum())

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

    def __init__(self, number: int, sets: Sequence[PlanSet], seed: int, *, is_uniform: bool = False) -> None:
        self.number = number
        self._sets = sets
        self._seed = seed
        self._cuts: dict[int, tuple[Ints, Ints]] = {}
        lengths = [plan.length if plan.is_in_epoch(number) else 0 for plan in sets]
        # A set's micro-batches fall evenly at random on the time from 0 to its end, when it is exhausted. As long as it lasts,
        # a draw is its own by its weight among those that last: one over that time for each of its micro-batches.
        ends = [(length if is_uniform else 1) / plan.probability for plan, length in zip(sets, lengths, strict=True)]
        order = np.argsort(_words(sum(lengths), draw_seed(seed, number, "mix")) * np.repeat(ends, lengths), kind="stable")
        self.datasets: Ints = np.repeat(np.arange(len(sets)), lengths)[order]
        """The set of each micro-batch."""
        self._rows = np.concatenate([np.arange(length) for length in lengths])[order]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> MicroBatch:
        dataset, row = int(self.datasets[index]), int(self._rows[index])
        if dataset not in self._cuts:  # a set that is passed over throughout is not cut
            self._cuts[dataset] = _cut(self._sets[dataset], draw_seed(self._seed, self.number, dataset, "samples"))
        buckets, table = self._cuts[dataset]
        return MicroBatch(
            dataset=dataset,
            bucket_WH=self._sets[dataset].buckets[buckets[row]],
            ids=tuple(table[row].tolist()),
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
    """All epochs, one after another, without end but where all sets have one."""

    def __init__(self, sets: Sequence[PlanSet], seed: int, *, is_uniform: bool = False) -> None:
        """`is_uniform`: draws weigh sets by their probability alone, and not by their share of the micro-batches too."""
        assert sets, "a run has at least one set"
        self.sets = tuple(sets)
        self.seed = seed
        self.is_uniform = is_uniform
        self.epoch_length = sum(plan.length for plan in self.sets)
        """Micro-batches in an epoch that all sets take part in."""

    def epoch(self, number: int) -> Epoch:
        """The micro-batches of epoch `number`, from 0, whatever step they come at."""
        return Epoch(number, self.sets, self.seed, is_uniform=self.is_uniform)

    def next_epoch(self, number: int, step: int) -> int | None:
        """The first epoch after `number` that has something for this optimiser step; None if none ever has."""
        members = [plan for plan in self.sets if plan.is_in_step(step) and plan.end_epoch > number + 1]
        return min((max(plan.first_epoch, number + 1) for plan in members), default=None)

    def groups(self, cursor: Cursor, *, rank: int, ranks: int, accumulation: int) -> Iterator[Dealt]:
        """Step after step, the micro-batches of `rank`: every `ranks`-th of the next `ranks` x `accumulation`.

        Those of sets that the step may not draw from are passed over. Ends where no set has enough for another step.
        A cursor beyond the end of its epoch, of a run that had more pictures, stands at the next.
        """
        number, position, step = cursor.epoch, cursor.position, cursor.step
        epoch = self.epoch(number)
        while True:
            is_open = [plan.is_in_step(step) for plan in self.sets]
            micros: list[MicroBatch] = []
            while len(micros) < ranks * accumulation:
                if position >= len(epoch):
                    following = self.next_epoch(number, step)
                    if following is None:
                        return
                    number, position = following, 0
                    epoch = self.epoch(number)
                    continue
                if is_open[epoch.datasets[position]]:
                    micros.append(epoch[position])
                position += 1
            step += 1
            after = Cursor(number + 1, 0, step) if position == len(epoch) else Cursor(number, position, step)
            ends = np.cumsum([len(micro.ids) for micro in micros]).tolist()
            firsts = [0, *ends[:-1]]
            yield Dealt(tuple(micros[rank::ranks]), tuple(firsts[rank::ranks]), ends[-1], after)


def _words(count: int, seed: int) -> NDArray[np.uint64]:
    """Random words: raw ones, which numpy promises for good, as it does not the results of `Generator`."""
    return np.random.PCG64(seed).random_raw(count)


def _shuffled(rows: int, length: int, seed: int) -> Ints:
    """Permutations of `length` indices, one for each row."""
    return np.argsort(_words(rows * length, seed).reshape(rows, length), axis=-1, kind="stable")


def _cut(plan: PlanSet, seed: int) -> tuple[Ints, Ints]:
    """The bucket of each micro-batch of a set, and its sample ids as rows (micro-batch, batch size).

    The last row of a bucket is filled up with the bucket's first samples of this epoch, round and round if it is smaller.
    """
    passes = _shuffled(plan.passes, len(plan.ids), seed).ravel()
    by_bucket = passes[np.argsort(plan.bucket_ids[passes], kind="stable")]
    visits, batches = plan.visits, plan.batches
    starts = np.cumsum(visits) - visits
    buckets = np.repeat(np.arange(len(batches)), batches)
    nth = np.arange(len(buckets)) - np.repeat(np.cumsum(batches) - batches, batches)
    within = nth[:, None] * plan.batch_size + np.arange(plan.batch_size)
    places = starts[buckets][:, None] + within % visits[buckets][:, None]
    return buckets, plan.ids[by_bucket[places]]
