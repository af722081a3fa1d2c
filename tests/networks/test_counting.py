"""The counting of memory, against cases computed by hand."""

from __future__ import annotations

import torch

from simpletuner.networks.counting import PeakBytes, stored_bytes

KIB = 1024


def test_what_lives_at_one_time_is_counted_and_what_died_is_not() -> None:
    with PeakBytes() as memory:
        a = torch.zeros(256)  # 1 KiB
        b = a + 1  # 2
        c = b * 2  # 3
        assert (memory.now, memory.peak) == (3 * KIB, 3 * KIB)
        del b, c
        assert memory.now == 1 * KIB
        d = torch.zeros(256, dtype=torch.float16)
        assert (memory.now, memory.peak) == (1.5 * KIB, 3 * KIB)
        del a, d
    assert memory.now == 0


def test_views_results_in_place_and_former_tensors_take_nothing() -> None:
    former = torch.zeros(256)
    with PeakBytes() as memory:
        view = former.view(16, 16).t()[2:]
        former.add_(1)
        own = view.contiguous()
        slices = own.split(2)
    assert (memory.now, memory.peak) == (14 * 16 * 4, 14 * 16 * 4)
    assert len(slices) == 7


def test_a_step_of_two_layers_is_what_a_pencil_says() -> None:
    """exp(exp(x)): autograd keeps both results of 1 KiB for the backward pass; the gradient passes through one more each."""
    x = torch.zeros(256, requires_grad=True)
    with PeakBytes() as memory:
        loss = x.exp().exp().sum()
        assert memory.now == 2 * KIB + 4
        loss.backward()
        assert x.grad is not None
        # At the second exp's backward: both results, the sum, its gradient of 4 bytes (expanded, no copy), and one product.
        assert memory.peak == 3 * KIB + 8
        del loss
    assert memory.now == 1 * KIB, "the gradient of x"


def test_stored_bytes_count_a_shared_storage_once() -> None:
    base = torch.zeros(100)
    assert stored_bytes([base, base[:10], torch.zeros(3, dtype=torch.int8)]) == 403
