from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import Told, make_run, trainer_of

from simpletuner.config.sections import Optimizer
from simpletuner.events import Stepped
from simpletuner.training.schedules import learning_rate


def options(**written: Any) -> Optimizer:
    return Optimizer(**{"learning_rate": 0.5, "lr_warmup_steps": 0, "lr_scheduler": "constant"} | written)


def test_constant_stays_at_the_peak_whatever_the_warmup() -> None:
    assert {learning_rate(step, options(lr_warmup_steps=10), 20) for step in range(20)} == {0.5}


def test_warmup_rises_linearly_to_the_peak_and_stays() -> None:
    written = options(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    rates = [learning_rate(step, written, 8) for step in range(8)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5])


def test_cosine_is_half_a_cosine_from_peak_to_end() -> None:
    written = options(lr_scheduler="cosine", lr_warmup_steps=10, lr_end=0.1)
    assert learning_rate(10, written, 110) == pytest.approx(0.5)
    assert learning_rate(60, written, 110) == pytest.approx(0.3)
    assert learning_rate(110, written, 110) == pytest.approx(0.1)
    assert learning_rate(35, written, 110) == pytest.approx(0.1 + 0.2 * (1 + math.sqrt(0.5)))


def test_cosine_without_warmup_equals_torchs_own() -> None:
    import torch

    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    stock = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    written = options(lr_scheduler="cosine", lr_end=0.1)
    for step in range(50):
        assert learning_rate(step, written, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        stock.step()


@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 600),
    kind=st.sampled_from(["constant", "constant_with_warmup", "cosine"]),
    end=st.floats(0, 0.5),
)
def test_no_step_has_a_rate_of_zero_or_above_the_peak(steps: int, warmup: int, kind: str, end: float) -> None:
    written = options(lr_scheduler=kind, lr_warmup_steps=warmup, lr_end=end)
    assert all(0 < learning_rate(step, written, steps) <= 0.5 for step in range(steps))


def test_a_run_steps_through_its_schedule_once_for_each_optimiser_step(tmp_path: Path) -> None:
    written = {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "lr_end": 0.001, "gradient_accumulation_steps": 3}
    run, told = make_run(tmp_path, **written), Told()
    with trainer_of(run, steps=9, told=told) as trainer:
        trainer.fit()
    warmup = [0.01 * n / 3 for n in (1, 2, 3)]
    fall = [0.001 + 0.009 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    assert [event.learning_rate for event in told.of(Stepped)] == pytest.approx(warmup + fall)
