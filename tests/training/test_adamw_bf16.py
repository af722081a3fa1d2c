from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simpletuner.training import adamw_bf16
from simpletuner.training.adamw_bf16 import AdamWBF16, rounded_stochastically


def parameter(values: Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.to(dtype))


def step(optimizer: torch.optim.Optimizer, moved: Tensor, gradient: Tensor | float) -> None:
    moved.grad = torch.as_tensor(gradient).to(moved).expand_as(moved).clone()
    optimizer.step()


def test_bf16_weights_drift_as_far_as_exact_ones() -> None:
    """200 steps of 1e-4 from 1.0, where bf16's next number is 0.004 away: rounding to the nearest never moves."""
    weights = parameter(torch.ones(4096))
    optimizer = AdamWBF16([weights], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        step(optimizer, weights, 1.0)
    assert 1 - weights.float().mean().item() == pytest.approx(0.0200, rel=0.02)


def test_moments_decay_as_far_as_exact_ones_do() -> None:
    """2000 steps of zero gradient; a second moment rounded to the nearest freezes at once."""
    weights = parameter(torch.ones(4096))
    optimizer = AdamWBF16([weights], lr=0.0)
    exact = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    stock = torch.optim.AdamW([exact], lr=0.0)
    for gradient in [1.0] * 5 + [0.0] * 2000:
        step(optimizer, weights, gradient)
        step(stock, exact, gradient)
    true = stock.state[exact]["exp_avg_sq"].item()
    assert true == pytest.approx(0.00067, rel=0.02)
    assert optimizer.state[weights]["exp_avg_sq"].float().mean().item() == pytest.approx(true, rel=0.02)
    assert optimizer.state[weights]["exp_avg"].float().abs().max().item() < 1e-30


def test_the_second_moments_rounding_noise_settles_at_a_few_percent() -> None:
    torch.manual_seed(0)
    weights, exact = parameter(torch.ones(4096)), torch.nn.Parameter(torch.ones(4096))
    optimizer, stock = AdamWBF16([weights], lr=0.0), torch.optim.AdamW([exact], lr=0.0)
    for _ in range(3000):
        gradient = torch.randn(4096).bfloat16()
        step(optimizer, weights, gradient)
        step(stock, exact, gradient)
    ratio = optimizer.state[weights]["exp_avg_sq"].float() / stock.state[exact]["exp_avg_sq"]
    assert ratio.mean().item() == pytest.approx(1, abs=0.005)
    assert 0.02 < ratio.std().item() < 0.05


def test_bf16_weights_follow_float64_adamw_on_a_real_objective() -> None:
    """The mean path over many copies; single ones differ by their rounding."""
    torch.manual_seed(0)
    start, goal = torch.randn(8), torch.randn(8)
    weights = parameter(start.repeat(512, 1))
    exact = torch.nn.Parameter(start.bfloat16().double())
    ours, stock = AdamWBF16([weights], lr=1e-3), torch.optim.AdamW([exact], lr=1e-3)
    for _ in range(300):
        step(ours, weights, weights.detach().float() - goal)
        step(stock, exact, exact.detach() - goal)
    torch.testing.assert_close(weights.float().mean(0).double(), exact.detach(), atol=3e-3, rtol=0)


def test_float32_weights_get_torchs_own_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-2, 2, 30).view(5, 6)) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer, stock = AdamWBF16([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(50):
        gradient = torch.randn(5, 6)
        step(optimizer, ours, gradient)
        step(stock, theirs, gradient)
    torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=1e-5)
    assert optimizer.state[ours]["exp_avg_sq"].dtype == torch.float32


def test_cutting_into_chunks_changes_no_number_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(size, 3)) for size in (1, 7, 2, 9)]
        optimizer = AdamWBF16(weights, lr=0.1)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        return weights

    whole = trained()
    monkeypatch.setattr(adamw_bf16, "CHUNK_ELEMENTS", 10)
    for one, other in zip(whole, trained(), strict=True):
        assert torch.equal(one, other)


def test_the_same_steps_round_the_same_way_and_draw_nothing_from_training() -> None:
    def trained() -> Tensor:
        weights = parameter(torch.ones(1000))
        optimizer = AdamWBF16([weights], lr=1e-3)
        for _ in range(5):
            step(optimizer, weights, 1.0)
        return weights.detach()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, trained())
    assert len(first.unique()) > 1


def test_rounding_is_right_on_average_and_keeps_exact_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = 1.0, 1.0078125  # neighbours in bf16
    x = torch.full((100_000,), low + 0.25 * (high - low))
    rounded = rounded_stochastically(x, generator).float()
    assert set(rounded.tolist()) == {low, high}
    assert (rounded == high).float().mean().item() == pytest.approx(0.25, abs=0.01)
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, float("inf"), float("-inf")])
    assert torch.equal(rounded_stochastically(exact, generator).float(), exact)


def test_no_kind_of_nan_is_rounded_to_a_number() -> None:
    """CUDA's NaN has all bits set: noise added to it would carry over into -0.0."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).repeat(1000)
    assert rounded_stochastically(bits.view(torch.float32), torch.Generator()).isnan().all()


def test_weight_with_gradient_and_moments_takes_eight_bytes() -> None:
    weights = parameter(torch.ones(1000))
    optimizer = AdamWBF16([weights])
    step(optimizer, weights, 1.0)
    assert weights.grad is not None
    tensors = [weights, weights.grad, optimizer.state[weights]["exp_avg"], optimizer.state[weights]["exp_avg_sq"]]
    assert sum(tensor.nbytes for tensor in tensors) == 8 * 1000
