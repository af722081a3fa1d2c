"""How long a run is, against dealing it."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.data.plan import PlanSet, Stream
from simpletuner.data.samples import Cursor
from simpletuner.data.walk import walk
from tests.data.test_plan import plan_sets, stream_of

SQUARE = [(64, 64)]
any_stream = stream_of(st.lists(plan_sets(may_end=True), min_size=1, max_size=3))


def plan(batches: int, **bounds: float) -> PlanSet:
    return PlanSet(np.arange(batches), np.zeros(batches, int), SQUARE, batch_size=1, **bounds)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(any_stream, st.integers(1, 3), st.integers(1, 60))
def test_as_many_steps_as_asked_for_can_be_dealt_or_the_walk_is_cut_short(stream: Stream, batches: int, wanted: int) -> None:
    way = walk(stream, batches, steps=wanted, epochs=None)
    groups = stream.groups(Cursor(), rank=0, ranks=1, accumulation=batches)
    steps = [group for group, _ in zip(groups, range(wanted), strict=False)]
    assert way.steps == len(steps)
    assert way.is_cut_short == (len(steps) < wanted)
    seen = {micro.dataset for step in steps for micro in step.micros}
    assert set(way.unvisited) <= set(range(len(stream.sets))) - seen
    if steps and not way.is_cut_short:
        assert steps[-1].after.epoch <= way.epochs <= steps[-1].after.epoch + 1


@settings(deadline=None, max_examples=40)
@given(any_stream, st.integers(1, 3), st.integers(1, 5))
def test_epochs_are_as_many_steps_as_it_takes_to_deal_them(stream: Stream, batches: int, epochs: int) -> None:
    way = walk(stream, batches, steps=None, epochs=Fraction(epochs))
    groups = stream.groups(Cursor(), rank=0, ranks=1, accumulation=batches)
    micros = [micro for group in takewhile(lambda g: g.micros[0].epoch < epochs, groups) for micro in group.micros]
    if way.is_cut_short:
        assert way.steps * batches == len(micros)
    else:
        assert way.steps == -(-sum(micro.epoch < epochs for micro in micros) // batches)


def test_epochs_and_steps_of_an_even_stream_are_reckoned_at_once() -> None:
    stream = Stream([plan(1000), plan(600)], 0)
    assert walk(stream, 4, steps=10**9, epochs=None).epochs == 10**9 * 4 / 1600
    assert walk(stream, 4, steps=None, epochs=Fraction("2.5")).steps == 1000
    assert walk(stream, 3, steps=10**9, epochs=Fraction(1)).steps == 534


def test_a_set_that_starts_at_a_step_gives_the_rest_of_its_epoch_and_all_of_the_next() -> None:
    stream = Stream([plan(100), plan(100, first_step=50)], 0)
    first = walk(stream, 1, steps=None, epochs=Fraction(1))
    assert 120 < first.steps < 180, "about half of the second set is left when half of the first is through"
    assert walk(stream, 1, steps=None, epochs=Fraction(2)).steps == first.steps + 200


def test_sets_of_some_epochs_count_in_those() -> None:
    stream = Stream([plan(10), plan(30, first_epoch=1, end_epoch=3), plan(5, first_epoch=9)], 0)
    assert [walk(stream, 1, steps=None, epochs=Fraction(epochs)).steps for epochs in (1, 2, 3, 4)] == [10, 50, 90, 100]
    assert walk(stream, 1, steps=100, epochs=None).unvisited == (2,)


def test_epochs_that_no_set_takes_part_in_pass_at_once() -> None:
    stream = Stream([plan(10, end_epoch=1), plan(10, first_epoch=10**12)], 0)
    assert walk(stream, 1, steps=15, epochs=None).epochs == 10**12 + 0.5
    assert walk(stream, 3, steps=None, epochs=Fraction(7)).steps == 4, "three whole steps, and one that the second set fills"
    assert walk(stream, 5, steps=None, epochs=Fraction(7)).epochs == 7
    groups = stream.groups(Cursor(), rank=0, ranks=1, accumulation=10)
    assert [next(groups).micros[0].epoch for _ in range(2)] == [0, 10**12]


@pytest.mark.parametrize("bounds", [{"end_step": 7}, {"end_epoch": 2}])
def test_where_all_sets_end_the_run_does(bounds: dict[str, float]) -> None:
    way = walk(
        Stream([plan(5, **bounds), plan(5, **{key: value - 1 for key, value in bounds.items()})], 0), 2, steps=99, epochs=None
    )
    assert (way.steps, way.is_cut_short) == (7, True)
    assert way.unvisited == ()


def test_a_million_samples_that_start_late_are_counted_in_two_seconds() -> None:
    late = replace(plan(1_000_000, first_step=100_000))
    started_s = time.process_time()
    way = walk(Stream([plan(8), late], 0), 1, steps=200_000, epochs=None)
    assert time.process_time() - started_s < 2
    assert way.steps == 200_000
