"""The flow process against diffusers' scheduler and its own algebra."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from simpletuner.diffusion.process import FlowMatching

FLOW = FlowMatching()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 5, 4, 3, 2, generator=draw, dtype=torch.float64)
    return x0, noise, torch.rand(5, generator=draw, dtype=torch.float64)


def test_a_noisy_latent_equals_that_of_the_stock_scheduler(batch):
    x0, noise, _ = batch
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    chosen = torch.tensor([0, 200, 500, 900, 999])
    stock = scheduler.scale_noise(x0.float(), scheduler.timesteps[chosen], noise.float())
    torch.testing.assert_close(FLOW.diffuse(x0, noise, scheduler.sigmas[chosen]).float(), stock)


def test_the_ends_of_time_are_the_clean_latent_and_pure_noise(batch):
    x0, noise, _ = batch
    assert torch.equal(FLOW.diffuse(x0, noise, torch.zeros(5)), x0)
    assert torch.equal(FLOW.diffuse(x0, noise, torch.ones(5)), noise)


def test_the_target_is_the_slope_of_the_path(batch):
    x0, noise, t = batch
    slope = (FLOW.diffuse(x0, noise, t + 1e-3) - FLOW.diffuse(x0, noise, t - 1e-3)) / 2e-3
    torch.testing.assert_close(FLOW.target(x0, noise, t), slope)


def test_the_right_answer_leads_back_to_the_clean_latent_and_to_the_noise(batch):
    x0, noise, t = batch
    x = FLOW.diffuse(x0, noise, t)
    torch.testing.assert_close(FLOW.clean(x, FLOW.target(x0, noise, t), t), x0)
    torch.testing.assert_close(FLOW.noise(x, x0, t), noise)


@pytest.mark.parametrize("method", ["diffuse", "target", "clean", "noise"])
def test_half_precision_latents_are_mixed_in_float32(method):
    first, second = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.tensor([0.1, 0.5, 0.77])
    answer = getattr(FLOW, method)(first, second, t)
    assert answer.dtype == torch.float32
    assert torch.equal(answer, getattr(FLOW, method)(first.float(), second.float(), t))


def test_times_in_float64_do_not_widen_float32_latents():
    x0, noise = torch.randn(2, 3, 4, 2, 2)
    assert FLOW.diffuse(x0, noise, torch.rand(3, dtype=torch.float64)).dtype == torch.float32
