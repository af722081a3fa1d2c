"""What the optimisers of the catalogue do to weights: each learns, and some against their paper's formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.sections import Optimizer
from simpletuner.training.optimizers import averaged, build_optimizer

RATES = {name: 0.1 for name in OPTIMIZERS if any(kind in name for kind in ("sgd", "radam", "ranger", "adagrad", "adafactor"))}
RATES |= {"prodigy": 1.0}
IN_BF16 = [name for name, row in OPTIMIZERS.items() if row.trained_dtype == "bfloat16"]
STEPS = 50


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("name", "format_name"), [(name, "float32") for name in OPTIMIZERS] + [(name, "bfloat16") for name in IN_BF16]
)
def test_every_optimiser_learns_a_least_squares_problem_at_its_default_settings(name: str, format_name: str) -> None:
    """Weights in the format that a run would have them in; 4096 of them, so that states of few bits are of few bits."""
    dtype = getattr(torch, format_name)
    torch.manual_seed(0)
    inputs_BD, goal_DO = torch.randn(256, 64), torch.randn(64, 64)
    answers_BO = inputs_BD @ goal_DO
    weight_DO = nn.Parameter(torch.randn(64, 64).to(dtype))
    optimizer = build_optimizer(Optimizer(optimizer=name, learning_rate=RATES.get(name, 0.02)), {"weight": weight_DO})

    def loss() -> Tensor:
        return (inputs_BD @ weight_DO.float() - answers_BO).square().mean()

    before = loss().item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with averaged(optimizer, {"weight": weight_DO}), torch.no_grad():
        assert loss().item() < 0.7 * before


class Adam:
    """Kingma & Ba 2015, with the decoupled decay of Loshchilov & Hutter 2019."""

    def __init__(self, betas: tuple[float, float], eps: float, decay: float) -> None:
        self.beta1, self.beta2, self.eps, self.decay = *betas, eps, decay
        self.m = self.v = torch.zeros((), dtype=torch.float64)

    def step(self, x: Tensor, gradient: Tensor, number: int, rate: float) -> Tensor:
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m, v = self.m / (1 - self.beta1**number), self.v / (1 - self.beta2**number)
        rate = self.scaled(rate, gradient, v)
        return x - rate * self.decay * x - rate * m / (v.sqrt() + self.eps)

    def scaled(self, rate: float, gradient: Tensor, v: Tensor) -> float:
        return rate


class StableAdam(Adam):
    """Wortsman et al. 2023: the rate is divided by the root mean square of gradient over second moment, if that is above 1."""

    def scaled(self, rate: float, gradient: Tensor, v: Tensor) -> float:
        return rate / max(1.0, (gradient**2 / v.clamp(min=self.eps**2)).mean().sqrt().item())


class Lion:
    """Chen et al. 2023."""

    def __init__(self, betas: tuple[float, float], decay: float) -> None:
        self.beta1, self.beta2, self.decay = *betas, decay
        self.m = torch.zeros((), dtype=torch.float64)

    def step(self, x: Tensor, gradient: Tensor, number: int, rate: float) -> Tensor:
        update = (self.beta1 * self.m + (1 - self.beta1) * gradient).sign()
        self.m = self.beta2 * self.m + (1 - self.beta2) * gradient
        return x - rate * (update + self.decay * x)


FORMULAS: dict[str, Callable[[], Any]] = {
    "adamw_bf16": lambda: Adam((0.9, 0.999), 1e-8, 0.01),
    "torch-adamw": lambda: Adam((0.9, 0.999), 1e-8, 0.01),
    "torch-adam": lambda: Adam((0.9, 0.999), 1e-8, 0.0),
    "optimi-adamw": lambda: Adam((0.9, 0.99), 1e-6, 0.01),
    "optimi-adam": lambda: Adam((0.9, 0.99), 1e-6, 0.0),
    "optimi-stableadamw": lambda: StableAdam((0.9, 0.99), 1e-6, 0.01),
    "optimi-lion": lambda: Lion((0.9, 0.99), 0.0),
    "bnb-adamw": lambda: Adam((0.9, 0.999), 1e-8, 0.01),
    "bnb-adam": lambda: Adam((0.9, 0.999), 1e-8, 0.0),
    "bnb-lion": lambda: Lion((0.9, 0.99), 0.0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_float32_weights_follow_the_formula_of_the_paper_in_float64(name: str) -> None:
    """At the catalogue's settings, over 60 steps of a rate that changes, with a spike that StableAdamW is there to tame."""
    torch.manual_seed(0)
    start, formula = torch.randn(40), FORMULAS[name]()
    weight, exact = nn.Parameter(start.clone()), start.double()
    optimizer = build_optimizer(Optimizer(optimizer=name, learning_rate=0.01), {"weight": weight})
    for number in range(1, 61):
        gradient = torch.randn(40) * (30 if number == 20 else 1)
        rate = 0.01 * (1 - number / 100)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient.clone()
        optimizer.step()
        exact = formula.step(exact, gradient.double(), number, rate)
    torch.testing.assert_close(weight.detach().double(), exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", IN_BF16)
def test_weights_kept_in_bf16_drift_as_far_as_exact_ones(name: str) -> None:
    """200 steps of a fixed gradient from 1.0, where bf16's next number is 0.004 away: a weight rounded to the nearest stays."""
    weights = [nn.Parameter(torch.ones(512, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    for weight in weights:
        options = Optimizer(optimizer=name, learning_rate=1e-4, optimizer_config={"weight_decay": 0.0})
        optimizer = build_optimizer(options, {"weight": weight})
        for _ in range(200):
            weight.grad = torch.ones_like(weight) * 0.5
            optimizer.step()
    drifts = [1 - weight.detach().float().mean().item() for weight in weights]
    assert drifts[1] > 0.001
    assert drifts[0] == pytest.approx(drifts[1], abs=0.002)
