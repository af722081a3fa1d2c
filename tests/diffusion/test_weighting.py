"""Adaptive weights against the rule written out sample by sample."""

from __future__ import annotations

import bisect

import pytest
import torch

from simpletuner.diffusion.process import CosineEpsilon
from simpletuner.diffusion.weighting import AdaptiveWeights

LOG_SNR = CosineEpsilon().log_snr
EDGES = [-10 + 20 * i / 298 for i in range(299)]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def bucket(t: float) -> int:
    return bisect.bisect_left(EDGES, float(LOG_SNR(torch.tensor([t]))[0]))


def test_the_weight_is_one_over_the_running_mean_of_the_bucket():
    weights = AdaptiveWeights(LOG_SNR)
    means = {}
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        t, loss = torch.rand(6, generator=draw), torch.rand(6, generator=draw)
        seen: dict[int, list[float]] = {}
        for one, its_loss in zip(t.tolist(), loss.tolist(), strict=True):
            seen.setdefault(bucket(one), []).append(its_loss)
        for which, losses in seen.items():
            means[which] = 0.99 * means.get(which, 1.0) + 0.01 * sum(losses) / len(losses)
        weights.note(t[:2], loss[:2])
        weights.note(t[2:], loss[2:])
        weights.update(alone)
    times = torch.linspace(0, 1, 200)
    expected = [1 / means.get(bucket(t), 1.0) for t in times.tolist()]
    torch.testing.assert_close(weights.weight(times), torch.tensor(expected), atol=0, rtol=1e-5)


def test_untouched_buckets_keep_weight_1_and_extremes_are_clamped():
    weights = AdaptiveWeights(LOG_SNR)
    t = torch.tensor([0.5])
    assert weights.weight(torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 1, 1]
    weights.restore([0.0] * 300)
    assert weights.weight(t).item() == pytest.approx(1e7)
    weights.restore([1e9] * 300)
    assert weights.weight(t).item() == pytest.approx(1e-7)


def test_losses_of_other_ranks_count_alike():
    """What `total` returns is taken in, not this rank's share of it."""
    one, two = AdaptiveWeights(LOG_SNR), AdaptiveWeights(LOG_SNR)
    t = torch.tensor([0.2, 0.7])
    one.note(t, torch.tensor([3.0, 5.0]))
    other = AdaptiveWeights(LOG_SNR)
    other.note(t, torch.tensor([1.0, 7.0]))
    both = one._noted_2K + other._noted_2K
    for weights in (one, two):
        weights.update(lambda _: both)
    assert one.as_json() == two.as_json()
    torch.testing.assert_close(one.weight(t), 1 / torch.tensor([0.99 + 0.02, 0.99 + 0.06]))


def test_a_loss_that_an_empty_mask_made_is_not_learned_from():
    whole, masked = AdaptiveWeights(LOG_SNR), AdaptiveWeights(LOG_SNR)
    whole.note(torch.tensor([0.5]), torch.tensor([3.0]))
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0, 0] = 0.25
    masked.note(torch.tensor([0.5, 0.5]), torch.tensor([3.0, 0.0]), mask)
    for weights in (whole, masked):
        weights.update(alone)
    assert masked.as_json() == whole.as_json() != AdaptiveWeights(LOG_SNR).as_json()


def test_its_state_is_restored_exactly():
    weights, again = AdaptiveWeights(LOG_SNR), AdaptiveWeights(LOG_SNR)
    weights.note(torch.rand(50), torch.rand(50))
    weights.update(alone)
    again.restore(weights.as_json())
    t = torch.linspace(0, 1, 100)
    assert torch.equal(again.weight(t), weights.weight(t))


def test_nothing_is_read_back_from_the_device():
    """On `meta`, which holds no values."""
    weights = AdaptiveWeights(LOG_SNR, "meta")
    t = torch.rand(3, device="meta")
    weights.note(t, torch.rand(3, device="meta"))
    weights.update(alone)
    assert weights.weight(t).shape == (3,)
