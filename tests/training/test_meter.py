from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from training_fakes import make_batch

from simpletuner.data.ranks import Alone
from simpletuner.errors import RunError
from simpletuner.training.meter import Meter

NORM = torch.tensor(0.5)
TIME = torch.tensor([0.25, 0.95])


class WithAnother(Alone):
    """Two ranks, of which the other one always tells the same."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value)), self.other]


def losses(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_a_log_point_tells_the_mean_over_all_samples_since_the_last_one() -> None:
    meter = Meter(Alone())
    meter.add(1, [make_batch(0, 0), make_batch(0, 1)], [losses(1, 2), losses(3, 4)], [TIME, TIME], NORM)
    meter.add(2, [make_batch(0, 2)], [losses(5, 9)], [TIME], torch.tensor(0.75))
    figures = meter.figures()
    assert (figures.loss, figures.grad_norm, figures.regularisation_loss) == (4.0, 0.75, None)
    meter.add(3, [make_batch(0, 3)], [losses(7, 7)], [TIME], NORM)
    assert meter.figures().loss == 7.0


def test_regularisation_is_counted_apart() -> None:
    meter = Meter(Alone())
    meter.add(
        1, [make_batch(0, 0), make_batch(0, 1, is_regularisation=True)], [losses(1, 2), losses(10, 20)], [TIME, TIME], NORM
    )
    figures = meter.figures()
    assert (figures.loss, figures.regularisation_loss) == (1.5, 15.0)


def test_the_other_ranks_samples_count_too() -> None:
    meter = Meter(WithAnother([[6.0, 7.0], [8.0], [2, 0], []]))
    meter.add(1, [make_batch(0, 0)], [losses(1, 2)], [TIME], NORM)
    figures = meter.figures()
    assert (figures.loss, figures.regularisation_loss) == (4.0, 8.0)
    assert figures.loss_by_time == {"0.0-0.1": 7.0, "0.2-0.3": 3.5, "0.9-1.0": 2.0}


def test_the_loss_is_told_by_the_tenth_of_time_too_and_regularisation_is_left_out() -> None:
    meter = Meter(Alone())
    times = [torch.tensor([0.05, 1.0]), torch.tensor([0.0999, 0.5]), torch.tensor([0.05, 0.5])]
    batches = [make_batch(0, 0), make_batch(0, 1), make_batch(0, 2, is_regularisation=True)]
    meter.add(1, batches, [losses(1, 2), losses(4, 8), losses(100, 100)], times, NORM)
    assert meter.figures().loss_by_time == {"0.0-0.1": 2.5, "0.5-0.6": 8.0, "0.9-1.0": 2.0}
    meter.add(2, batches[2:], [losses(100, 100)], times[2:], NORM)
    assert meter.figures().loss_by_time == {}


def test_a_window_that_is_saved_in_its_middle_ends_as_it_would_have() -> None:
    def add(meter: Meter, step: int) -> None:
        meter.add(step, [make_batch(0, step)], [losses(0.1 * step, 1 / 3)], [TIME], NORM)

    whole, former, later = (Meter(Alone()) for _ in range(3))
    for step in range(1, 8):
        add(whole, step)
        add(former if step < 4 else later, step)
    former.read()
    later.restore(json.loads(json.dumps(former.as_json())))
    told, expected = later.figures(), whole.figures()
    assert (told.loss, told.loss_by_time) == (expected.loss, expected.loss_by_time)


def test_a_window_saved_before_losses_were_told_by_time_is_taken_over() -> None:
    meter = Meter(Alone())
    meter.restore({"ordinary": [1.0], "regularisation": [], "skipped": 0, "grad_norm": 0.5})
    meter.add(2, [make_batch(0, 0)], [losses(2, 3)], [TIME], NORM)
    figures = meter.figures()
    assert (figures.loss, figures.loss_by_time) == (2.0, {"0.2-0.3": 2.0, "0.9-1.0": 3.0})


def test_a_loss_that_is_not_finite_names_its_step_and_file_even_if_later_ones_follow() -> None:
    meter = Meter(Alone())
    meter.add(4, [make_batch(0, 0)], [losses(1, 2)], [TIME], NORM)
    meter.add(5, [make_batch(0, 1), make_batch(0, 2)], [losses(1, 2), losses(1, math.nan)], [TIME, TIME], NORM)
    meter.add(6, [make_batch(0, 3)], [losses(math.nan, math.nan)], [TIME], torch.tensor(math.nan))
    with pytest.raises(RunError, match=r"The loss of step 5 is not finite\. It came from: 0-2-b\.png\."):
        meter.read()


def test_a_gradient_that_is_not_finite_names_all_files_of_its_step() -> None:
    meter = Meter(Alone())
    meter.add(5, [make_batch(0, 1)], [losses(1, 2)], [TIME], torch.tensor(math.inf))
    with pytest.raises(RunError, match=r"The gradient of step 5 is not finite\. It came from: 0-1-a\.png, 0-1-b\.png\."):
        meter.read()


def test_every_rank_stops_at_the_first_bad_loss_of_any() -> None:
    meter = Meter(WithAnother([[1.0], [], [9], [[3, "loss", "theirs.png"]]]))
    meter.add(3, [make_batch(0, 0)], [losses(1, 2)], [TIME], NORM)
    with pytest.raises(RunError, match=r"step 3(.|\n)*theirs\.png"):
        meter.read()


def test_time_for_jobs_does_not_count_against_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 15.0, 16.0, 16.0])  # made, job from 10 to 15, log point
    monkeypatch.setattr("simpletuner.training.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(Alone())
    meter.add(1, [make_batch(0, 0)], [losses(1, 2)], [TIME], NORM)
    with meter.paused():
        pass
    assert meter.figures().samples_per_s == pytest.approx(2 / 11)
