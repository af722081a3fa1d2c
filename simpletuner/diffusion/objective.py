"""What the answer is held to: one number for each sample, so that weights, masks and meters come after.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simpletuner.config.sections import Objective
from simpletuner.diffusion.process import along

__all__ = ["huber", "huber_c", "l2", "perturbation", "sample_loss", "smooth_l1"]


def l2(answer_BCHW: Tensor, target_BCHW: Tensor, *, mask_B1HW: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, (B,) float32."""
    return _mean((answer_BCHW.float() - target_BCHW.float()).square(), mask_B1HW)


def huber(answer_BCHW: Tensor, target_BCHW: Tensor, c_B: Tensor, *, mask_B1HW: Tensor | None = None) -> Tensor:
    """Mean of 2c (sqrt(d^2 + c^2) - c) of each sample, (B,) float32: d^2 for |d| far below c, 2c |d| far above."""
    return c_B.float() * smooth_l1(answer_BCHW, target_BCHW, c_B, mask_B1HW=mask_B1HW)


def smooth_l1(answer_BCHW: Tensor, target_BCHW: Tensor, c_B: Tensor, *, mask_B1HW: Tensor | None = None) -> Tensor:
    """Mean of 2 (sqrt(d^2 + c^2) - c) of each sample, (B,) float32: d^2 / c for |d| far below c, 2 |d| far above."""
    d_BCHW = answer_BCHW.float() - target_BCHW.float()
    c_B111 = along(c_B, d_BCHW)
    # d^2 / (sqrt(d^2 + c^2) + c) is sqrt(d^2 + c^2) - c without the difference of near-equal numbers, which for |d| far below c
    # leaves no digit in float32. And hypot takes no square, which a small c would lose.
    return _mean(2 * d_BCHW.square() / (torch.hypot(d_BCHW, c_B111) + c_B111), mask_B1HW)


def huber_c(objective: Objective, t_B: Tensor, flow_time_B: Tensor) -> Tensor:
    """c of each sample by `huber_schedule`, (B,) float32, for its time and its `Process.flow_time`."""
    c = objective.huber_c
    if objective.huber_schedule == "exponential":
        return c ** t_B.float()
    if objective.huber_schedule == "snr":
        return (1 - c) * (1 - flow_time_B.float()).square() + c
    return torch.full_like(t_B, c, dtype=torch.float32)


def sample_loss(
    objective: Objective,
    answer_BCHW: Tensor,
    target_BCHW: Tensor,
    *,
    t_B: Tensor,
    flow_time_B: Tensor,
    mask_B1HW: Tensor | None = None,
) -> Tensor:
    """Loss of each sample by `loss_type`, (B,) float32. With a mask only of the cells that it shows."""
    if objective.loss_type == "l2":
        return l2(answer_BCHW, target_BCHW, mask_B1HW=mask_B1HW)
    distance = huber if objective.loss_type == "huber" else smooth_l1
    return distance(answer_BCHW, target_BCHW, huber_c(objective, t_B, flow_time_B), mask_B1HW=mask_B1HW)


def _mean(distance_BCHW: Tensor, mask_B1HW: Tensor | None) -> Tensor:
    """Mean of each sample, weighed by its mask: sum(m e) / (C sum(m)); 0 where the mask is empty, gradients too."""
    if mask_B1HW is None:
        return distance_BCHW.flatten(1).mean(1)
    weight_B = distance_BCHW.shape[1] * mask_B1HW.flatten(1).sum(1)
    return (mask_B1HW * distance_BCHW).flatten(1).sum(1) / weight_B.clamp(min=torch.finfo(torch.float32).tiny)


def perturbation(objective: Objective, step: int) -> float:
    """Share of further noise in the input, after `step` optimiser steps. Source: Ning et al. 2023 (DDPM-IP), algorithm 1."""
    steps = objective.input_perturbation_steps
    left = max(0.0, 1 - step / steps) if steps else 1.0
    return objective.input_perturbation * left
