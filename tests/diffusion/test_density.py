"""Densities against closed forms, mpmath and draws; the shift against diffusers."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.sections import Flow
from simpletuner.diffusion import density

GRID = (torch.arange(999, dtype=torch.float64) + 1) / 1000


def test_uniform_gives_u_itself():
    assert torch.equal(density.uniform(GRID), GRID)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_logit_normal_inverts_its_cdf(scale):
    t = density.logit_normal(scale)(GRID)
    normal = torch.logit(t) / scale
    torch.testing.assert_close(0.5 * (1 + torch.erf(normal / math.sqrt(2))), GRID, atol=1e-12, rtol=0)


def test_beta_2_2_inverts_its_closed_form_cdf():
    t = density.beta(2.0, 2.0)(GRID)
    torch.testing.assert_close(3 * t**2 - 2 * t**3, GRID, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 1.0), (0.5, 1.0), (7.5, 1.0), (0.1, 1.0)])
def test_beta_of_one_side_is_a_power(alpha, beta):
    torch.testing.assert_close(density.beta(alpha, beta)(GRID), GRID ** (1 / alpha), atol=1e-9, rtol=1e-7)


def test_the_arcsine_law_is_met():
    torch.testing.assert_close(density.beta(0.5, 0.5)(GRID), torch.sin(math.pi / 2 * GRID) ** 2, atol=1e-9, rtol=1e-8)


def test_the_table_agrees_with_the_closed_form_of_2_2():
    torch.testing.assert_close(density.beta(2.0 + 1e-13, 2.0)(GRID), density.beta(2.0, 2.0)(GRID), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 3.0), (4.0, 2.0), (0.7, 2.2), (30.0, 20.0), (0.3, 40.0)])
def test_other_betas_invert_the_incomplete_beta_function(alpha, beta):
    quantile = density.beta(alpha, beta)
    for u in (0.001, 0.03, 0.25, 0.5, 0.8, 0.97, 0.999):
        t = quantile(torch.tensor([u], dtype=torch.float64)).item()
        assert float(mpmath.betainc(alpha, beta, 0, t, regularized=True)) == pytest.approx(u, abs=2e-9)


@settings(max_examples=40, deadline=None)
@given(alpha=st.floats(0.05, 200), beta=st.floats(0.05, 200))
def test_any_beta_rises_within_the_unit_interval_and_mirrors_its_twin(alpha, beta):
    t = density.beta(alpha, beta)(GRID)
    assert torch.all((t >= 0) & (t <= 1))
    assert torch.all(t.diff() >= 0)
    torch.testing.assert_close(1 - density.beta(beta, alpha)(1 - GRID), t, atol=1e-7, rtol=0)


def test_draws_from_torchs_own_beta_lie_where_the_quantiles_say():
    torch.manual_seed(0)
    draws = torch.distributions.Beta(3.0, 1.5).sample((200_000,))
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(density.beta(3.0, 1.5)(quartiles), draws.quantile(quartiles), atol=4e-3, rtol=0)


@pytest.mark.parametrize("shape", [density.uniform, density.logit_normal(), density.beta(2.0, 2.0), density.beta(3.0, 1.2)])
def test_the_ends_of_u_are_the_ends_of_time(shape):
    torch.testing.assert_close(shape(torch.tensor([0.0, 1.0], dtype=torch.float64)), torch.tensor([0.0, 1.0]).double())


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_shift_is_that_of_the_stock_scheduler(shift):
    times = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
    stock = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas[:1000]
    torch.testing.assert_close(density.shifted(density.uniform, shift)(times).float(), stock)


def test_a_shift_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        density.shifted(density.uniform, 0.0)


@pytest.mark.parametrize(("edge_px", "shift"), [(512, 1.649), (1024, 1.878), (2048, 3.158)])
def test_the_automatic_shift_of_sanas_native_sizes(edge_px, shift):
    assert density.auto_shift((edge_px // 32) ** 2) == pytest.approx(shift, abs=1e-3)


@pytest.mark.parametrize("tokens", [16, 256, 2304, 4096, 16384])
def test_the_automatic_shift_is_that_of_the_stock_pipelines(tokens):
    assert density.auto_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens, max_shift=1.15)))


def test_each_stratum_of_a_step_gets_one_draw_however_it_is_dealt():
    draw = torch.Generator().manual_seed(1)
    parts = [density.stratified(slot, count, 12, draw) for slot, count in ((0, 4), (4, 5), (9, 3))]
    assert torch.equal((torch.cat(parts) * 12).floor(), torch.arange(12).double())


def test_draws_within_a_stratum_are_uniform():
    draw = torch.Generator().manual_seed(1)
    offsets = torch.cat([density.stratified(2, 1, 4, draw) * 4 - 2 for _ in range(2000)])
    torch.testing.assert_close(
        offsets.quantile(torch.tensor([0.1, 0.5, 0.9]).double()), torch.tensor([0.1, 0.5, 0.9]).double(), atol=0.04, rtol=0
    )


def test_strata_beyond_the_step_are_refused():
    with pytest.raises(ValueError, match="within 4"):
        density.stratified(3, 2, 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda u: density.shifted(density.logit_normal(), 3.0)(u)),
        ({"flow_sigmoid_scale": 0.5, "flow_schedule_shift": 1.0}, density.logit_normal(0.5)),
        ({"flow_use_uniform_schedule": True, "flow_schedule_shift": 2.0}, density.shifted(density.uniform, 2.0)),
        (
            {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 4.0, "flow_schedule_shift": 1.0},
            density.beta(4.0, 2.0),
        ),
        (
            {"flow_schedule_auto_shift": True, "flow_schedule_shift": 9.0, "flow_use_uniform_schedule": True},
            density.shifted(density.uniform, math.exp(0.5 + 768 / 3840 * 0.65)),
        ),
    ],
)
def test_the_flow_options_choose_shape_and_shift(options, expected):
    torch.testing.assert_close(density.flow_density(Flow(**options), tokens=1024)(GRID), expected(GRID))
