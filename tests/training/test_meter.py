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
    meter.add(1, [make_batch(0, 0), make_batch(0, 1)], [losses(1, 2), losses(3, 4)], NORM)
    meter.add(2, [make_batch(0, 2)], [losses(5, 9)], torch.tensor(0.75))
    figures = meter.figures()
    assert (figures.loss, figures.grad_norm, figures.regularisation_loss) == (4.0, 0.75, None)
    meter.add(3, [make_batch(0, 3)], [losses(7, 7)], NORM)
    assert meter.figures().loss == 7.0


def test_regularisation_is_counted_apart() -> None:
    meter = Meter(Alone())
    meter.add(1, [make_batch(0, 0), make_batch(0, 1, is_regularisation=True)], [losses(1, 2), losses(10, 20)], NORM)
    figures = meter.figures()
    assert (figures.loss, figures.regularisation_loss) == (1.5, 15.0)


def test_the_other_ranks_samples_count_too() -> None:
    meter = Meter(WithAnother([[6.0, 7.0], [8.0], []]))
    meter.add(1, [make_batch(0, 0)], [losses(1, 2)], NORM)
    figures = meter.figures()
    assert (figures.loss, figures.regularisation_loss) == (4.0, 8.0)


def test_a_window_that_is_saved_in_its_middle_ends_as_it_would_have() -> None:
    def add(meter: Meter, step: int) -> None:
        meter.add(step, [make_batch(0, step)], [losses(0.1 * step, 1 / 3)], NORM)

    whole, former, later = (Meter(Alone()) for _ in range(3))
    for step in range(1, 8):
        add(whole, step)
        add(former if step < 4 else later, step)
    former.read()
    later.restore(json.loads(json.dumps(former.as_json())))
    assert later.figures().loss == whole.figures().loss


def test_a_loss_that_is_not_finite_names_its_step_and_file_even_if_later_ones_follow() -> None:
    meter = Meter(Alone())
    meter.add(4, [make_batch(0, 0)], [losses(1, 2)], NORM)
    meter.add(5, [make_batch(0, 1), make_batch(0, 2)], [losses(1, 2), losses(1, math.nan)], NORM)
    meter.add(6, [make_batch(0, 3)], [losses(math.nan, math.nan)], torch.tensor(math.nan))
    with pytest.raises(RunError, match=r"The loss of step 5 is not finite\. It came from: 0-2-b\.png\."):
        meter.read()


def test_a_gradient_that_is_not_finite_names_all_files_of_its_step() -> None:
    meter = Meter(Alone())
    meter.add(5, [make_batch(0, 1)], [losses(1, 2)], torch.tensor(math.inf))
    with pytest.raises(RunError, match=r"The gradient of step 5 is not finite\. It came from: 0-1-a\.png, 0-1-b\.png\."):
        meter.read()


def test_every_rank_stops_at_the_first_bad_loss_of_any() -> None:
    meter = Meter(WithAnother([[1.0], [], [[3, "loss", "theirs.png"]]]))
    meter.add(3, [make_batch(0, 0)], [losses(1, 2)], NORM)
    with pytest.raises(RunError, match=r"step 3(.|\n)*theirs\.png"):
        meter.read()


def test_time_for_jobs_does_not_count_against_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 15.0, 16.0, 16.0])  # made, job from 10 to 15, log point
    monkeypatch.setattr("simpletuner.training.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(Alone())
    meter.add(1, [make_batch(0, 0)], [losses(1, 2)], NORM)
    with meter.paused():
        pass
    assert meter.figures().samples_per_s == pytest.approx(2 / 11)
