from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simpletuner.config.sections import Objective
from simpletuner.diffusion.objective import huber, huber_c, l2, perturbation, sample_loss, smooth_l1

TIMES = torch.tensor([0.0, 0.5, 1.0])


def test_each_sample_has_its_own_mean_square():
    answer = torch.zeros(2, 3, 2, 2)
    target = torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), -0.5)])
    assert torch.equal(l2(answer, target), torch.tensor([4.0, 0.25]))


@pytest.mark.parametrize("loss", [l2, huber, smooth_l1])
def test_a_half_precision_answer_is_compared_in_float32(loss):
    # In bfloat16 both differences would be rounded away: 256 + 1 is 256.
    answer = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    c_B = [] if loss is l2 else [torch.tensor([1e-9])]
    value = loss(answer, torch.full((1, 1, 1, 1), 257.0), *c_B)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx({l2: 1.0, huber: 2e-9, smooth_l1: 2.0}[loss])


def closed_form(kind: str, d: Tensor, c_B: Tensor) -> tuple[Tensor, Tensor]:
    """The formula and its derivative by d, in float64; (B,) and one for each element."""
    d, c = d.double(), c_B.double().view(-1, 1, 1, 1)
    scale = {"huber": 2 * c, "smooth_l1": 2}[kind]
    root = torch.sqrt(d**2 + c**2)
    return (scale * (root - c)).mean(dim=(1, 2, 3)), scale * d / root / d[0].numel()


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_values_and_gradients_are_those_of_the_formula_in_float64(kind: str, size: float):
    target = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    answer = target + size * torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    answer.requires_grad_()
    c_B = torch.tensor([0.01, 0.1, 1.0])
    loss_B = {"huber": huber, "smooth_l1": smooth_l1}[kind](answer, target, c_B)
    loss_B.sum().backward()
    value_B, gradient = closed_form(kind, (answer - target).detach(), c_B)
    torch.testing.assert_close(loss_B.double(), value_B, atol=0, rtol=1e-6)
    assert answer.grad is not None
    torch.testing.assert_close(answer.grad.double(), gradient, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "small", "large"),
    [
        (huber, lambda d, c: d**2, lambda d, c: 2 * c * d.abs()),
        (smooth_l1, lambda d, c: d**2 / c, lambda d, c: 2 * d.abs()),
    ],
)
def test_small_differences_count_squared_and_large_ones_by_their_size(loss, small: Callable, large: Callable):
    # A ten-thousandth of c: the difference of near-equal numbers in the formula would leave nothing in float32.
    for d, c, limit in ((1e-5, 0.1, small), (-1e-5, 0.1, small), (500.0, 0.1, large), (-500.0, 0.1, large)):
        d, c = torch.tensor([d], dtype=torch.float64), torch.tensor([c], dtype=torch.float64)
        value = loss(d.float().view(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), c.float())
        torch.testing.assert_close(value.double(), limit(d, c), atol=0, rtol=5e-4)


@pytest.mark.parametrize("loss", [huber, smooth_l1])
def test_a_perfect_answer_has_no_loss_and_no_gradient_even_with_a_tiny_c(loss):
    answer = torch.zeros(1, 2, 2, 2, requires_grad=True)
    value = loss(answer, torch.zeros(1, 2, 2, 2), torch.tensor([1e-30]))
    value.sum().backward()
    assert value.item() == 0
    assert answer.grad is not None
    assert not answer.grad.any()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2]),
        ("exponential", [1.0, 0.2**0.5, 0.2]),
        ("snr", [1.0, 0.8 * 0.25 + 0.2, 0.2]),
    ],
)
def test_c_falls_from_1_on_clean_samples_to_itself_on_noise(schedule, expected: list[float]):
    c_B = huber_c(Objective(huber_c=0.2, huber_schedule=schedule), TIMES, TIMES)
    assert c_B.dtype == torch.float32
    assert c_B.tolist() == pytest.approx(expected)


def test_the_exponential_schedule_goes_by_time_and_snr_by_flow_time():
    other = torch.tensor([0.3, 0.3, 0.3])
    for schedule, first, second in (("exponential", TIMES, other), ("snr", other, TIMES)):
        objective = Objective(huber_schedule=schedule)
        assert torch.equal(huber_c(objective, first, second), huber_c(objective, TIMES, TIMES))


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_loss_type_chooses_the_loss_and_each_sample_has_its_own_c(schedule):
    answer, target = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    objectives = {kind: Objective(loss_type=kind, huber_schedule=schedule) for kind in ("l2", "huber", "smooth_l1")}
    losses = {
        kind: sample_loss(objective, answer, target, t_B=TIMES, flow_time_B=TIMES) for kind, objective in objectives.items()
    }
    c_B = huber_c(objectives["huber"], TIMES, TIMES)
    assert torch.equal(losses["l2"], l2(answer, target))
    assert torch.equal(losses["huber"], huber(answer, target, c_B))
    assert torch.equal(losses["smooth_l1"], smooth_l1(answer, target, c_B))


def test_perturbation_fades_linearly_over_its_steps():
    fading = Objective(input_perturbation=0.4, input_perturbation_steps=8)
    assert [perturbation(fading, step) for step in (0, 2, 4, 8, 100)] == pytest.approx([0.4, 0.3, 0.2, 0.0, 0.0])
    assert {perturbation(Objective(input_perturbation=0.4), step) for step in (0, 8, 10_000)} == {0.4}
    assert perturbation(Objective(), 3) == 0


@pytest.mark.parametrize("kind", ["l2", "huber", "smooth_l1"])
def test_a_masked_loss_is_the_mean_of_what_the_mask_shows(kind: str):
    generator = torch.Generator().manual_seed(3)
    answer, target = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    mask = torch.rand(2, 1, 4, 5, generator=generator)
    c, d = 0.1, (answer - target).double()
    error = {"l2": d**2, "huber": 2 * c * ((d**2 + c**2).sqrt() - c), "smooth_l1": 2 * ((d**2 + c**2).sqrt() - c)}[kind]
    expected = (mask * error).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)))
    times = torch.tensor([0.2, 0.8])
    loss_B = sample_loss(Objective(loss_type=kind), answer, target, t_B=times, flow_time_B=times, mask_B1HW=mask)
    torch.testing.assert_close(loss_B.double(), expected.double(), atol=0, rtol=1e-5)


def test_an_empty_mask_weighs_nothing_and_moves_nothing():
    answer = torch.ones(2, 3, 4, 4, requires_grad=True)
    mask = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    loss_B = l2(answer, torch.zeros(2, 3, 4, 4), mask_B1HW=mask)
    assert loss_B.tolist() == [0.0, 1.0]
    loss_B.sum().backward()
    assert answer.grad is not None
    assert not answer.grad[0].any()
    assert answer.grad[1].isfinite().all()
    assert answer.grad[1].all()


def test_what_a_mask_hides_moves_nothing():
    answer = torch.randn(1, 3, 4, 4).requires_grad_()
    mask = (torch.arange(16).reshape(1, 1, 4, 4) < 8).float()
    l2(answer, torch.zeros(1, 3, 4, 4), mask_B1HW=mask).sum().backward()
    assert answer.grad is not None
    assert torch.equal(answer.grad[0, 0] != 0, mask[0, 0] > 0)
