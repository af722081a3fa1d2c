"""Which of PyTorch's attention kernels a network prefers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["preferring"]

PREFERENCES = {
    "native-flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "native-efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "native-math": (SDPBackend.MATH,),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}
"""Kernels in their order: a preferred one that cannot serve a call (masks, wide heads) would be an error by itself."""


def preferring(mechanism: str) -> AbstractContextManager[Any]:
    """Inside, `scaled_dot_product_attention` takes the first kernel of the preference that can serve the call.

    The choice is torch's, for all threads of the process: the backward pass runs in another.
    """
    return nullcontext() if mechanism == "diffusers" else sdpa_kernel(list(PREFERENCES[mechanism]), set_priority=True)
