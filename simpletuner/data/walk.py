"""How far a stream carries a run: the steps that its epochs make, where sets may start and end in between.

Nothing is dealt: only an epoch in which a set starts or ends at a step is looked into, all others are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from simpletuner.data.plan import Stream

__all__ = ["Walk", "walk"]


@dataclass(frozen=True)
class Walk:
    """Where a run ends."""

    steps: int
    epochs: float
    is_cut_short: bool
    """Whether no set has anything left for another step, before the end that was asked for."""
    unvisited: tuple[int, ...]
    """Sets that were never drawn from."""


def walk(stream: Stream, step_batches: int, *, steps: int | None, epochs: Fraction | None) -> Walk:
    """Go on until `steps` optimiser steps of `step_batches` micro-batches are done or `epochs` have passed, what comes first.

    The last step of the last epoch may reach into the next one: it is as large as all others.
    """
    assert steps is not None or epochs is not None, "a run has an end"
    limit = math.inf if steps is None else steps * step_batches
    unvisited = set(range(len(stream.sets)))
    number, done = 0, 0  # epochs, and the micro-batches dealt in them
    while True:
        length = _dealt(stream, number, done, step_batches)
        is_last = length > 0 and _is_settled(stream, number, done // step_batches)  # all that follow are like it
        if epochs is not None and (is_last or number + 1 >= epochs):
            limit = min(limit, math.ceil((done + (epochs - number) * length) / step_batches) * step_batches)
            epochs = None
        end = limit if is_last else min(limit, done + length)
        unvisited -= {
            place
            for place, plan in enumerate(stream.sets)
            if plan.is_in_epoch(number) and plan.first_step * step_batches < end and plan.end_step * step_batches > done
        }
        if is_last or limit <= done + length:
            passed = (end - done) / length if length else 1.0
            return Walk(int(end) // step_batches, number + passed, False, tuple(sorted(unvisited)))
        done += length
        following = stream.next_epoch(number, done // step_batches)
        if following is None:
            return Walk(done // step_batches, number + 1.0, True, tuple(sorted(unvisited)))
        number = following if epochs is None else min(following, math.ceil(epochs) - 1)


def _is_settled(stream: Stream, number: int, step: int) -> bool:
    """Whether no set starts or ends any more, from this epoch and step on."""
    places = [(number, (plan.first_epoch, plan.end_epoch)) for plan in stream.sets]
    places += [(step, (plan.first_step, plan.end_step)) for plan in stream.sets]
    return all(bound <= place or bound == math.inf for place, bounds in places for bound in bounds)


def _dealt(stream: Stream, number: int, done: int, step_batches: int) -> int:
    """How many micro-batches an epoch gives, `done` having been dealt before it."""
    members = [plan for plan in stream.sets if plan.is_in_epoch(number)]
    bounds = sorted({bound for plan in members for bound in (plan.first_step, plan.end_step)})
    step = done // step_batches
    whole = sum(plan.length for plan in members if plan.is_in_step(step))
    ahead = [bound for bound in bounds if bound > step]
    if not ahead or whole < ahead[0] * step_batches - done:
        return whole
    datasets, position, before = stream.epoch(number).datasets, 0, done
    while True:
        step = done // step_batches
        is_open = np.array([plan.is_in_step(step) for plan in stream.sets])
        places = np.flatnonzero(is_open[datasets[position:]])
        wanted = min((bound for bound in bounds if bound > step), default=math.inf) * step_batches - done
        if len(places) < wanted:
            return done + len(places) - before
        position += int(places[int(wanted) - 1]) + 1
        done += int(wanted)
