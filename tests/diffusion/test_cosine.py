"""The cosine process against float64 closed forms and diffusers' scheduler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from simpletuner.diffusion.density import floored
from simpletuner.diffusion.process import CosineEpsilon

COSINE = CosineEpsilon()
TIMES = torch.tensor([0.0, 0.001, 0.0125, 0.1, 0.37, 0.5, 0.8, 0.95, 0.99, 0.9999, 1.0])


def abar(t: float, shift: float = 1.0, s: float = 0.008) -> float:
    """The published formula, number by number."""
    plain = math.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
    plain = min(max(plain, 1e-4), 0.9999)
    log_snr = math.log(plain / (1 - plain)) + 2 * math.log(1 / shift)
    log_snr = min(max(log_snr, -9.210240366975849), 9.210240366975849)
    return 1 / (1 + math.exp(-log_snr))


@pytest.mark.parametrize("shift", [1.0, 0.5, 4.0])
def test_the_signal_and_the_weight_equal_their_closed_forms(shift):
    process = CosineEpsilon(shift)
    expected = np.array([abar(t, shift) for t in TIMES.double().tolist()])
    np.testing.assert_allclose(process.signal(TIMES).numpy(), expected, rtol=1e-12, atol=0)
    np.testing.assert_allclose(process.log_snr(TIMES).numpy(), np.log(expected / (1 - expected)), atol=1e-6)
    np.testing.assert_allclose(process.weight(TIMES).numpy(), 1 - expected, rtol=1e-6)
    assert process.weight(TIMES).dtype == torch.float32


def test_the_ratio_is_time_itself_but_for_the_clamps():
    inner = torch.tensor([0.01, 0.3, 0.6, 0.99])
    torch.testing.assert_close(COSINE.ratio(inner), inner, atol=1e-6, rtol=0)
    ends = COSINE.ratio(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([0.002256, 0.993583], abs=1e-6)


@pytest.mark.parametrize("shift", [0.5, 4.0])
def test_the_ratio_names_the_time_that_has_this_signal(shift):
    process, t = CosineEpsilon(shift), torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    plain_t = process.ratio(t).double()
    np.testing.assert_allclose(COSINE.signal(plain_t).numpy(), process.signal(t).numpy(), rtol=1e-4)
    assert bool((plain_t > t).all()) == (shift > 1), "a shift above 1 is noisier"


def test_a_noisy_latent_equals_that_of_the_stock_scheduler():
    x0, noise = torch.randn(2, len(TIMES), 16, 3, 2, generator=torch.Generator().manual_seed(0))
    stock = DDPMWuerstchenScheduler().add_noise(x0, noise, TIMES)
    torch.testing.assert_close(COSINE.diffuse(x0, noise, TIMES), stock, atol=1e-5, rtol=0)


def test_a_noisy_latent_equals_the_closed_form_in_float64():
    x0, noise = torch.randn(2, len(TIMES), 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.tensor([[math.sqrt(abar(t)), math.sqrt(1 - abar(t))] for t in TIMES.double().tolist()], dtype=torch.float64)
    expected = shares[:, 0].view(-1, 1, 1, 1) * x0 + shares[:, 1].view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(COSINE.diffuse(x0, noise, TIMES), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(COSINE.diffuse(x0.float(), noise.float(), TIMES).double(), expected, atol=1e-6, rtol=0)


def test_the_right_answer_leads_back_to_the_clean_latent_and_to_the_noise():
    x0, noise = torch.randn(2, len(TIMES), 4, 2, 2, dtype=torch.float64)
    x = COSINE.diffuse(x0, noise, TIMES)
    assert torch.equal(COSINE.target(x0, noise, TIMES), noise)
    torch.testing.assert_close(COSINE.clean(x, noise, TIMES), x0)
    torch.testing.assert_close(COSINE.noise(x, x0, TIMES), noise)


@pytest.mark.parametrize("method", ["diffuse", "target", "clean", "noise"])
def test_half_precision_latents_are_mixed_in_float32(method):
    first, second = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.tensor([0.1, 0.5, 0.77])
    answer = getattr(COSINE, method)(first, second, t)
    assert answer.dtype == torch.float32
    assert torch.equal(answer, getattr(COSINE, method)(first.float(), second.float(), t))


def test_training_times_are_the_authors():
    """clamp(U + 0.001, 0.001, 1): uniform, and a thousandth of it is pure noise."""
    u = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = floored(0.001)(u)
    assert torch.equal(t, torch.clamp(u + 0.001, 0.001, 1))
    assert t.min() >= 0.001
    assert floored(0.001)(torch.tensor([0.0, 0.4999, 0.9995])).tolist() == pytest.approx([0.001, 0.5009, 1.0])
