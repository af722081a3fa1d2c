"""The stream: what it contains, that it is the same for everyone, and that it can be taken up anywhere."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.plan import PlanSet, Stream
from simpletuner.data.samples import Cursor, MicroBatch

BUCKETS = [(1024, 1024), (896, 1152), (1152, 896)]


@st.composite
def plan_sets(draw: st.DrawFn) -> PlanSet:
    bucket_ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=25))
    ids = np.array(sorted(draw(st.sets(st.integers(0, 99), min_size=len(bucket_ids), max_size=len(bucket_ids)))))
    return PlanSet(ids, np.array(bucket_ids), BUCKETS, batch_size=draw(st.integers(1, 6)), repeats=draw(st.integers(0, 3)))


streams = st.builds(Stream, st.lists(plan_sets(), min_size=1, max_size=3), st.integers(0, 2**32))


def a_stream(seed: int = 7) -> Stream:
    large = PlanSet(np.arange(23), np.arange(23) % 3, BUCKETS, batch_size=4)
    small = PlanSet(np.arange(2), np.zeros(2, int), BUCKETS, batch_size=3, repeats=4)
    return Stream([large, small], seed)


def dealt(
    stream: Stream, cursor: Cursor, *, ranks: int, accumulation: int, steps: int
) -> list[list[tuple[MicroBatch, int, int, Cursor]]]:
    """For each step its micro-batches over all ranks, with slot, slots and cursor, in the order of slots."""
    by_rank = [islice(stream.groups(cursor, rank=r, ranks=ranks, accumulation=accumulation), steps) for r in range(ranks)]
    return [
        sorted(
            [(m, first, g.slots, g.after) for g in parts for m, first in zip(g.micros, g.first_slots, strict=True)],
            key=lambda row: row[1],
        )
        for parts in zip(*by_rank, strict=True)
    ]


@given(streams, st.integers(0, 3))
def test_every_sample_comes_once_in_each_pass_and_only_top_ups_come_again(stream: Stream, epoch: int) -> None:
    visits = Counter((m.dataset, sample) for m in stream.epoch(epoch) for sample in m.ids)
    for dataset, plan in enumerate(stream.sets):
        assert {sample for d, sample in visits if d == dataset} == set(plan.ids.tolist())
        again = Counter[tuple[int, int]]()
        for sample, bucket in zip(plan.ids.tolist(), plan.bucket_ids.tolist(), strict=True):
            surplus = visits[dataset, sample] - (plan.repeats + 1)
            assert surplus >= 0
            again[BUCKETS[bucket]] += surplus
        assert {bucket: n for bucket, n in again.items() if n} == plan.top_ups()
        assert all(n < plan.batch_size for n in again.values())


@given(streams)
def test_a_batch_is_full_and_never_mixes_sets_or_buckets(stream: Stream) -> None:
    epoch = stream.epoch(0)
    assert [m.index for m in epoch] == list(range(stream.epoch_length))
    for micro in epoch:
        plan = stream.sets[micro.dataset]
        bucket_of = dict(zip(plan.ids.tolist(), plan.bucket_ids.tolist(), strict=True))
        assert len(micro.ids) == plan.batch_size
        assert {BUCKETS[bucket_of[sample]] for sample in micro.ids} == {micro.bucket_WH}


def test_a_top_up_does_not_double_a_sample_of_its_own_batch_while_there_are_others() -> None:
    stream = Stream([PlanSet(np.arange(5), np.zeros(5, int), BUCKETS, batch_size=4)], seed=1)
    for epoch in range(20):
        assert all(len(set(micro.ids)) == 4 for micro in stream.epoch(epoch))


@given(streams, st.integers(0, 60))
def test_the_stream_from_any_cursor_is_the_tail_of_the_whole(stream: Stream, taken: int) -> None:
    whole = list(islice(stream.micro_batches(Cursor()), taken + 10))
    epoch, position = divmod(taken, stream.epoch_length)
    assert list(islice(stream.micro_batches(Cursor(epoch, position)), 10)) == whole[taken:]


@given(streams, st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_a_run_resumed_after_any_step_goes_on_with_the_next(stream: Stream, ranks: int, accumulation: int, done: int) -> None:
    steps = dealt(stream, Cursor(), ranks=ranks, accumulation=accumulation, steps=done + 3)
    cursor = steps[done - 1][0][3] if done else Cursor()
    assert cursor.position < stream.epoch_length
    assert dealt(stream, cursor, ranks=ranks, accumulation=accumulation, steps=3) == steps[done:]


@given(streams, st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]))
def test_ranks_and_accumulation_only_deal_the_same_step_differently(stream: Stream, shape: tuple[int, int]) -> None:
    ranks, accumulation = shape
    alone = dealt(stream, Cursor(), ranks=1, accumulation=6, steps=4)
    assert dealt(stream, Cursor(), ranks=ranks, accumulation=accumulation, steps=4) == alone


def test_a_run_can_be_resumed_on_another_number_of_ranks() -> None:
    stream = a_stream()
    before = dealt(stream, Cursor(), ranks=2, accumulation=2, steps=5)
    after = dealt(stream, before[2][0][3], ranks=4, accumulation=1, steps=2)
    assert after == before[3:]


@given(streams, st.integers(1, 3), st.integers(1, 3))
def test_the_slots_of_a_step_are_as_many_as_its_samples_and_none_twice(stream: Stream, ranks: int, accumulation: int) -> None:
    for step in dealt(stream, Cursor(), ranks=ranks, accumulation=accumulation, steps=3):
        slots = [slot for micro, first, _, _ in step for slot in range(first, first + len(micro.ids))]
        assert slots == list(range(step[0][2]))


def test_epochs_and_seeds_differ() -> None:
    assert [m.ids for m in a_stream().epoch(0)] != [m.ids for m in a_stream().epoch(1)]
    assert [m.ids for m in a_stream(7).epoch(0)] != [m.ids for m in a_stream(8).epoch(0)]
    assert [m.dataset for m in a_stream().epoch(0)] != sorted(m.dataset for m in a_stream().epoch(0))


def test_the_stream_is_the_same_on_every_machine_and_for_all_time() -> None:
    """A change here makes every resumed run go on with other batches."""
    first = [(micro.dataset, micro.ids) for micro in islice(a_stream().epoch(3), 4)]
    assert first == [(1, (0, 1, 0)), (1, (1, 0, 0)), (1, (1, 1, 0)), (0, (17, 20, 2, 8))]


def test_an_epoch_is_as_long_as_its_buckets_fill_batches() -> None:
    assert a_stream().epoch_length == 3 * 2 + 4  # buckets of 8, 8 and 7 samples by four; 2 samples x 5 passes by three


def test_a_million_samples_are_planned_in_two_seconds() -> None:
    bucket_ids = np.random.default_rng(0).integers(0, 3, 1_000_000)
    started_s = time.process_time()
    stream = Stream([PlanSet(np.arange(1_000_000), bucket_ids, BUCKETS, batch_size=4)], seed=0)
    next(stream.groups(Cursor(2, 200_000), rank=1, ranks=2, accumulation=2))
    assert time.process_time() - started_s < 2
