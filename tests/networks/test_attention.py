from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.networks.attention import PREFERENCES, preferring


class Kernels(TorchDispatchMode):
    """Notes which fused attention kernels run, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name():
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def attended(mechanism: str) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    with Kernels() as kernels, preferring(mechanism):
        answer = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        answer.square().sum().backward()
    assert query.grad is not None
    return answer.detach(), query.grad, kernels.names


def test_the_preferred_kernel_runs() -> None:
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in attended("native-flash")[2]
    assert attended("native-math")[2] == set()
    assert attended("diffusers")[2], "the CPU's own choice is flash, so the plain kernel above was chosen by us"


@pytest.mark.parametrize("mechanism", PREFERENCES)
def test_every_kernel_gives_the_same_numbers_and_none_leaves_a_call_unserved(mechanism: str) -> None:
    answer, gradient, _ = attended("diffusers")
    other, other_gradient, _ = attended(mechanism)
    torch.testing.assert_close(other, answer, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-5)


def test_the_preference_ends_with_its_block() -> None:
    with preferring("native-math"):
        pass
    assert attended("diffusers")[2]
