from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    stock = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    written = options(lr_scheduler="cosine", lr_end=0.1)
    for step in range(50):
        assert learning_rate(step, written, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        stock.step()


CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda p: 1 - p,
    "polynomial": lambda p: (1 - p) ** 2.5,
    "cosine": lambda p: np.cos(np.pi * p / 2) ** 2,
    "cosine_with_restarts": lambda p: np.cos(np.pi / 2 * (3 * p - np.floor(3 * p))) ** 2,
    "sine": lambda p: 1 - np.sin(3 * np.pi * p) ** 2,
}
"""Share of the way from `lr_end` to the peak, with three cycles and the power 2.5."""


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_every_curve_is_its_closed_form_over_the_whole_run(kind: str, warmup: int) -> None:
    written = options(lr_scheduler=kind, lr_warmup_steps=warmup, lr_end=0.1, lr_num_cycles=3, lr_power=2.5)
    rise = 0.5 * np.arange(1, warmup + 1, dtype=np.float64) / warmup if warmup else np.empty(0)
    fall = 0.1 + 0.4 * CURVES[kind](np.arange(200 - warmup, dtype=np.float64) / (200 - warmup))
    assert [learning_rate(step, written, 200) for step in range(200)] == pytest.approx([*rise, *fall], rel=1e-12)


def stock_rates(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_the_curves_equal_those_of_diffusers_which_warm_up_from_zero() -> None:
    """Its warmup has k / warmup where ours has (k + 1) / warmup; after it they are one."""
    from diffusers import optimization

    warmup = {"num_warmup_steps": 5, "num_training_steps": 40}
    stock: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
        "linear": lambda optimizer: optimization.get_linear_schedule_with_warmup(optimizer, **warmup),
        "cosine": lambda optimizer: optimization.get_cosine_schedule_with_warmup(optimizer, **warmup),
        "cosine_with_restarts": lambda optimizer: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, **warmup, num_cycles=3
        ),
        "polynomial": lambda optimizer: optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, **warmup, lr_end=0, power=2.5
        ),
    }
    for kind, make in stock.items():
        written = options(lr_scheduler=kind, lr_warmup_steps=5, lr_num_cycles=3, lr_power=2.5)
        ours, theirs = [learning_rate(step, written, 40) for step in range(40)], stock_rates(make, 40)
        assert ours[5:] == pytest.approx(theirs[5:], rel=1e-9), kind
        assert ours[:4] == pytest.approx(theirs[1:5], rel=1e-9), kind


@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 600),
    kind=st.sampled_from(["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]),
    end=st.floats(0, 0.5),
    cycles=st.integers(1, 9),
    power=st.floats(0.1, 5),
)
def test_no_step_has_a_rate_of_zero_or_above_the_peak(
    steps: int, warmup: int, kind: str, end: float, cycles: int, power: float
) -> None:
    written = options(lr_scheduler=kind, lr_warmup_steps=warmup, lr_end=end, lr_num_cycles=cycles, lr_power=power)
    assert all(0 < learning_rate(step, written, steps) <= 0.5 for step in range(steps))


def test_a_sine_touches_its_end_once_in_each_cycle() -> None:
    written = options(lr_scheduler="sine", lr_num_cycles=2, lr_end=0.1)
    rates = [learning_rate(step, written, 40) for step in range(40)]
    assert [step for step in range(40) if rates[step] == pytest.approx(0.1)] == [10, 30]
    assert [step for step in range(40) if rates[step] == pytest.approx(0.5)] == [0, 20]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("optimizer", ["torch-adamw", "ao-adamw8bit"])
def test_a_run_takes_each_optimiser_step_at_its_rate(tmp_path: Path, kind: str, accumulation: int, optimizer: str) -> None:
    """What the optimiser itself finds in its parameter group at each step, and what is told of it."""
    written = {"lr_scheduler": kind, "lr_warmup_steps": 3, "lr_end": 0.001, "lr_num_cycles": 3, "lr_power": 2.5}
    run = make_run(tmp_path, **written, gradient_accumulation_steps=accumulation, optimizer=optimizer)
    told, seen = Told(), []
    with torch.compiler.set_stance("force_eager"), trainer_of(run, steps=12, told=told) as trainer:
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda: (  # type: ignore[method-assign,assignment]
            seen.append(float(trainer.optimizer.param_groups[0]["lr"])),
            step(),
        )
        trainer.fit()
    rise = 0.01 * np.arange(1, 4) / 3
    expected = [*rise, *(0.001 + 0.009 * CURVES[kind](np.arange(9) / 9))]
    assert seen == pytest.approx(expected, rel=1e-6)
    assert [event.learning_rate for event in told.of(Stepped)] == pytest.approx(expected, rel=1e-12)
