"""The stream: what it contains, that it is the same for everyone, and that it can be taken up anywhere."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data.plan import PlanSet, Stream
from simpletuner.data.samples import Cursor, MicroBatch

BUCKETS = [(1024, 1024), (896, 1152), (1152, 896)]


@st.composite
def plan_sets(draw: st.DrawFn, *, may_end: bool = False) -> PlanSet:
    """Any small set. One that may end, may start late too; the first of a stream does neither."""
    bounds = {}
    if may_end:
        for unit, most in (("epoch", 4), ("step", 30)):
            first = draw(st.just(0) | st.integers(0, most))
            bounds |= {f"first_{unit}": first, f"end_{unit}": draw(st.just(math.inf) | st.integers(first + 1, first + most))}
    bucket_ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=25))
    ids = np.array(sorted(draw(st.sets(st.integers(0, 99), min_size=len(bucket_ids), max_size=len(bucket_ids)))))
    return PlanSet(
        ids, np.array(bucket_ids), BUCKETS, batch_size=draw(st.integers(1, 6)), repeats=draw(st.integers(0, 3)),
        probability=draw(st.sampled_from([1.0, 1.0, 0.1, 3.0])), **bounds,
    )  # fmt: skip


def stream_of(sets: st.SearchStrategy[list[PlanSet]]) -> st.SearchStrategy[Stream]:
    return st.builds(Stream, sets, st.integers(0, 2**32), is_uniform=st.booleans())


streams = stream_of(st.lists(plan_sets(), min_size=1, max_size=3))
scheduled = stream_of(st.builds(lambda a, b: [a, *b], plan_sets(), st.lists(plan_sets(may_end=True), min_size=1, max_size=2)))
"""Streams in which sets start and end."""


def a_stream(seed: int = 7) -> Stream:
    large = PlanSet(np.arange(23), np.arange(23) % 3, BUCKETS, batch_size=4)
    small = PlanSet(np.arange(2), np.zeros(2, int), BUCKETS, batch_size=3, repeats=4)
    return Stream([large, small], seed)


def micro_batches(stream: Stream, cursor: Cursor) -> Iterator[MicroBatch]:
    """One after another, as one process without accumulation has them."""
    return (dealt.micros[0] for dealt in stream.groups(cursor, rank=0, ranks=1, accumulation=1))


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
    whole = list(islice(micro_batches(stream, Cursor()), taken + 10))
    epoch, position = divmod(taken, stream.epoch_length)
    assert list(islice(micro_batches(stream, Cursor(epoch, position, taken)), 10)) == whole[taken:]


def test_a_run_of_more_pictures_is_taken_up_with_fewer() -> None:
    whole = a_stream()
    half = Stream([replace(plan, ids=plan.ids[:2], bucket_ids=plan.bucket_ids[:2]) for plan in whole.sets], whole.seed)
    assert half.epoch_length < 8 < whole.epoch_length
    assert next(micro_batches(half, Cursor(2, 8, 30))) == half.epoch(3)[0]


@given(scheduled, st.integers(1, 2), st.integers(1, 3))
def test_a_step_draws_from_just_the_sets_that_have_started_and_not_ended(stream: Stream, ranks: int, accumulation: int) -> None:
    for step, rows in enumerate(dealt(stream, Cursor(), ranks=ranks, accumulation=accumulation, steps=25)):
        for micro, *_ in rows:
            plan = stream.sets[micro.dataset]
            assert plan.first_step <= step < plan.end_step
            assert plan.first_epoch <= micro.epoch < plan.end_epoch


def planned(stream: Stream) -> Iterator[tuple[tuple[int, int], PlanSet]]:
    """(epoch, index) and set of every micro-batch, whatever step it comes at."""
    for number in count():
        yield from (((number, index), stream.sets[dataset]) for index, dataset in enumerate(stream.epoch(number).datasets))


@given(scheduled, st.integers(1, 2), st.integers(1, 2))
def test_nothing_but_what_has_not_started_or_has_ended_is_passed_over(stream: Stream, ranks: int, accumulation: int) -> None:
    steps = dealt(stream, Cursor(), ranks=ranks, accumulation=accumulation, steps=20)
    came = {(micro.epoch, micro.index): step for step, rows in enumerate(steps) for micro, *_ in rows}
    following = 0
    for place, plan in reversed(list(takewhile(lambda row: row[0] <= max(came), planned(stream)))):
        following = came.get(place, following)
        assert place in came or not plan.is_in_step(following)


@given(scheduled, st.integers(0, 3))
def test_a_set_that_takes_part_in_an_epoch_gives_every_sample_in_it(stream: Stream, number: int) -> None:
    visits = Counter((micro.dataset, sample) for micro in stream.epoch(number) for sample in micro.ids)
    for dataset, plan in enumerate(stream.sets):
        each = [visits[dataset, sample] for sample in plan.ids.tolist()]
        assert min(each) >= plan.passes if plan.is_in_epoch(number) else not any(each)


@given(streams | scheduled, st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_a_run_resumed_after_any_step_goes_on_with_the_next(stream: Stream, ranks: int, accumulation: int, done: int) -> None:
    steps = dealt(stream, Cursor(), ranks=ranks, accumulation=accumulation, steps=done + 3)
    cursor = steps[done - 1][0][3] if done else Cursor()
    assert cursor.position < stream.epoch_length
    assert cursor.step == done
    assert dealt(stream, cursor, ranks=ranks, accumulation=accumulation, steps=3) == steps[done:]


@given(streams | scheduled, st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]))
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


def mixture(probabilities: list[float], batches: list[int], *, is_uniform: bool) -> list[int]:
    """The set of each micro-batch of an epoch."""
    plans = [
        PlanSet(np.arange(length), np.zeros(length, int), BUCKETS, batch_size=1, probability=weight)
        for weight, length in zip(probabilities, batches, strict=True)
    ]
    return [micro.dataset for micro in Stream(plans, 3, is_uniform=is_uniform).epoch(0)]


def test_a_draw_weighs_a_set_by_its_probability_and_its_share_as_long_as_all_last() -> None:
    order = mixture([1.0, 0.25], [2000, 4000], is_uniform=False)
    mixed = order[: 2000 + 1000]
    assert 0.3 < mixed.count(1) / len(mixed) < 0.36, "2000 x 1 to 4000 x 0.25 is two to one"
    halves = [mixed[:1500].count(1), mixed[1500:].count(1)]
    assert max(halves) < 1.2 * min(halves), "and from the beginning to the end"
    assert order[3100:].count(0) == 0, "the set of full probability is through, the other goes on alone"


def test_without_probabilities_all_sets_last_as_long() -> None:
    order = mixture([1.0, 1.0], [3000, 300], is_uniform=False)
    assert [0.08 < order[start : start + 1100].count(1) / 1100 < 0.102 for start in (0, 1100, 2200)] == [True] * 3


def test_uniform_draws_leave_the_share_out() -> None:
    order = mixture([1.0, 1.0], [3000, 300], is_uniform=True)
    assert 250 < order[:600].count(1) <= 300
    assert order[700:].count(1) == 0
    order = mixture([1.0, 3.0], [3000, 300], is_uniform=True)
    assert 270 < order[:400].count(1) <= 300, "three draws in four"


def test_micro_batches_may_differ_in_size_between_sets() -> None:
    plans = [PlanSet(np.arange(8), np.zeros(8, int), BUCKETS, batch_size=size) for size in (1, 4)]
    rows = [row for step in dealt(Stream(plans, 1), Cursor(), ranks=2, accumulation=1, steps=5) for row in step]
    assert sorted(len(micro.ids) for micro, *_ in rows) == [1] * 8 + [4] * 2


def test_a_stream_ends_where_all_its_sets_have_ended() -> None:
    plan = PlanSet(np.arange(5), np.zeros(5, int), BUCKETS, batch_size=1, end_epoch=2)
    assert len(list(Stream([plan], 1).groups(Cursor(), rank=0, ranks=1, accumulation=3))) == 3, "the tenth is no whole step"
    plan = replace(plan, end_epoch=math.inf, end_step=4)
    assert len(list(Stream([plan], 1).groups(Cursor(), rank=0, ranks=1, accumulation=3))) == 4


@pytest.mark.parametrize("pictures", [1, 3, 25])
def test_a_few_pictures_in_many_aspects_make_whole_batches(pictures: int) -> None:
    """Batch 4, accumulation 2, one to twenty-five pictures in ten aspects: nothing is dropped, nothing else is asked for."""
    buckets = [(64 * (nth + 1), 64) for nth in range(10)]
    stream = Stream([PlanSet(np.arange(pictures), np.arange(pictures) % 10, buckets, batch_size=4)], 1)
    steps = list(islice(stream.groups(Cursor(), rank=0, ranks=1, accumulation=2), 2 * stream.epoch_length))
    micros = [micro for step in steps for micro in step.micros]
    assert [len(micro.ids) for micro in micros] == [4] * 4 * stream.epoch_length
    assert {sample for micro in micros[: stream.epoch_length] for sample in micro.ids} == set(range(pictures))
    assert stream.epoch_length == min(pictures, 10)


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


def test_a_million_samples_that_have_not_started_are_passed_over_in_two_seconds() -> None:
    large = PlanSet(np.arange(1_000_000), np.zeros(1_000_000, int), BUCKETS, batch_size=4, first_step=10_000, probability=0.5)
    small = PlanSet(np.arange(8), np.zeros(8, int), BUCKETS, batch_size=4)
    started_s = time.process_time()
    steps = list(islice(Stream([large, small], seed=0).groups(Cursor(), rank=0, ranks=1, accumulation=1), 4))
    assert [micro.dataset for step in steps for micro in step.micros] == [1] * 4
    assert time.process_time() - started_s < 2
