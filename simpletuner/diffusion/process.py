"""Noise processes: how a clean latent is spoiled, and what the denoiser must answer. No model, no state.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
Time t_B runs from 0 (clean) to 1 (pure noise) in every process. Arithmetic is never below float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CosineEpsilon", "FlowMatching", "Process"]

LEAST_SIGNAL = 1e-4
"""Neither the clean latent nor the noise ever has a smaller share of the variance in a cosine process."""


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


@dataclass(frozen=True)
class CosineEpsilon:
    """Variance-preserving cosine process: x_t = sqrt(abar) x0 + sqrt(1 - abar) noise, and the answer is the noise.

    abar(t) = cos^2((t + s) / (1 + s) pi/2) / cos^2(s / (1 + s) pi/2), clamped; `shift` > 1 moves all of it towards noise. The
    schedule is computed in float64: in float32 the log of the signal-to-noise ratio is off by 6e-4 at the clamp.
    Source: Nichol & Dhariwal 2021, section 3.2; clamps and shift as Pernias et al. 2023 (Wuerstchen) train.
    """

    shift: float = 1.0
    s: float = 0.008

    def log_snr(self, t_B: Tensor) -> Tensor:
        """ln(abar / (1 - abar)) in float64, within +-9.2102."""
        # The shift adds 2 ln(1 / shift) and may leave the range that the network knows, so there is a second clamp.
        abar_B = (self._cosine_squared(exact(t_B)) / self._start).clamp(LEAST_SIGNAL, 1 - LEAST_SIGNAL)
        bound = math.log((1 - LEAST_SIGNAL) / LEAST_SIGNAL)
        return (torch.logit(abar_B) - 2 * math.log(self.shift)).clamp(-bound, bound)

    def signal(self, t_B: Tensor) -> Tensor:
        """abar in float64: the share of the clean latent in the variance."""
        return torch.sigmoid(self.log_snr(t_B))

    def ratio(self, t_B: Tensor) -> Tensor:
        """What the network is told in place of t, float32: the time at which the plain cosine has this signal.

        It is t itself but for the clamps, which keep it within [0.002256, 0.993583], and the shift.
        """
        angle_B = torch.acos((self.signal(t_B) * self._start).sqrt())
        return (angle_B * (2 / math.pi) * (1 + self.s) - self.s).float()

    def weight(self, t_B: Tensor) -> Tensor:
        """P2 weight 1 / (1 + SNR) = 1 - abar, float32. Source: Choi et al. 2022, with k = 1 and gamma = 1."""
        return torch.sigmoid(-self.log_snr(t_B)).float()

    def diffuse(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        x0_BCHW, noise_BCHW = widened(x0_BCHW), widened(noise_BCHW)
        signal_B111, noise_B111 = self._shares(x0_BCHW, t_B)
        return signal_B111 * x0_BCHW + noise_B111 * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return widened(noise_BCHW)

    def clean(self, x_BCHW: Tensor, answer_BCHW: Tensor, t_B: Tensor) -> Tensor:
        x_BCHW = widened(x_BCHW)
        signal_B111, noise_B111 = self._shares(x_BCHW, t_B)
        return (x_BCHW - noise_B111 * widened(answer_BCHW)) / signal_B111

    def noise(self, x_BCHW: Tensor, x0_BCHW: Tensor, t_B: Tensor) -> Tensor:
        x_BCHW = widened(x_BCHW)
        signal_B111, noise_B111 = self._shares(x_BCHW, t_B)
        return (x_BCHW - signal_B111 * widened(x0_BCHW)) / noise_B111

    def flow_time(self, t_B: Tensor) -> Tensor:
        log_snr_B = self.log_snr(t_B)
        return torch.sigmoid(-log_snr_B / 2)  # amplitudes stand to each other as the square root of the SNR

    @property
    def _start(self) -> float:
        return math.cos(self.s / (1 + self.s) * math.pi / 2) ** 2

    def _cosine_squared(self, t_B: Tensor) -> Tensor:
        return torch.cos((t_B + self.s) / (1 + self.s) * (math.pi / 2)).square()

    def _shares(self, x_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar), rounded to the format of `x_BCHW` at the very end."""
        log_snr_B = self.log_snr(t_B)
        return along(torch.sigmoid(log_snr_B).sqrt(), x_BCHW), along(torch.sigmoid(-log_snr_B).sqrt(), x_BCHW)


def exact(t_B: Tensor) -> Tensor:
    """float64, where the device has it: Apple's has none."""
    return t_B.to(torch.float32 if t_B.device.type == "mps" else torch.float64)


def widened(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def along(t_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1) in the format of `x_BCHW`, so that it multiplies sample by sample."""
    return t_B.to(x_BCHW).view(-1, *[1] * (x_BCHW.ndim - 1))
