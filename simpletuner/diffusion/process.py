"""Noise processes: how a clean latent is spoiled, and what the denoiser must answer. No model, no state.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
Time t_B runs from 0 (clean) to 1 (pure noise) in every process. Arithmetic is never below float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["FlowMatching", "Process"]


class Process(Protocol):
    """A way from data to noise. Half-precision tensors may be handed in; the answers are float32 or wider."""

    def diffuse(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noisy latent at time t."""
        ...

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the denoiser should answer there."""
        ...

    def clean(self, x_BCHW: Tensor, answer_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that an answer at `x_BCHW` means."""
        ...

    def noise(self, x_BCHW: Tensor, x0_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noise that would lead from `x0_BCHW` to `x_BCHW`; it has no answer at t = 0."""
        ...

    def flow_time(self, t_B: Tensor) -> Tensor:
        """Noise's share of signal and noise at time t, by amplitude: noise / (signal + noise), the t of rectified flow."""
        ...


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: x_t = (1 - t) x0 + t noise, and the answer is the velocity noise - x0.

    Source: Liu et al. 2022 (Flow Straight and Fast), section 2.1; time as in Esser et al. 2024 (SD3).
    """

    def diffuse(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        x0_BCHW, noise_BCHW = widened(x0_BCHW), widened(noise_BCHW)
        t_B111 = along(t_B, x0_BCHW)
        return (1 - t_B111) * x0_BCHW + t_B111 * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return widened(noise_BCHW) - widened(x0_BCHW)

    def clean(self, x_BCHW: Tensor, answer_BCHW: Tensor, t_B: Tensor) -> Tensor:
        x_BCHW = widened(x_BCHW)
        return x_BCHW - along(t_B, x_BCHW) * widened(answer_BCHW)

    def noise(self, x_BCHW: Tensor, x0_BCHW: Tensor, t_B: Tensor) -> Tensor:
        x_BCHW, x0_BCHW = widened(x_BCHW), widened(x0_BCHW)
        t_B111 = along(t_B, x_BCHW)
        return (x_BCHW - (1 - t_B111) * x0_BCHW) / t_B111

    def flow_time(self, t_B: Tensor) -> Tensor:
        return t_B


def widened(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def along(t_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1) in the format of `x_BCHW`, so that it multiplies sample by sample."""
    return t_B.to(x_BCHW).view(-1, *[1] * (x_BCHW.ndim - 1))
