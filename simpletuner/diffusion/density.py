"""Which times are trained, as inverse CDFs: u in (0, 1) -> t in (0, 1).

Training draws u, stratified over the whole optimiser step; a fixed grid of u gives the same density without chance.
Everything keeps the format of u: hand in float64 (as `stratified` draws it) and round t at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from simpletuner.config.sections import Flow
from simpletuner.diffusion.beta import beta_quantile

__all__ = ["Density", "auto_shift", "beta", "floored", "flow_density", "logit_normal", "shifted", "stratified", "uniform"]

Density = Callable[[Tensor], Tensor]
"""Inverse CDF: u_B -> t_B."""


def uniform(u_B: Tensor) -> Tensor:
    """All times alike."""
    return u_B


def floored(least: float) -> Density:
    """All times alike above `least`: u + least, at most 1. A share of `least` falls on pure noise itself."""
    return lambda u_B: (u_B + least).clamp(least, 1.0)


def logit_normal(scale: float = 1.0) -> Density:
    """sigmoid(scale x normal): the middle most, the ends hardly. Source: Esser et al. 2024 (SD3), section 3.1."""
    return lambda u_B: torch.sigmoid(scale * torch.special.ndtri(u_B))


def beta(alpha: float, beta: float) -> Density:
    """Beta(alpha, beta); alpha > beta leans towards noise."""
    if (alpha, beta) == (2.0, 2.0):
        # The root in [0, 1] of u = 3 t^2 - 2 t^3.
        return lambda u_B: 0.5 - torch.sin(torch.asin(1 - 2 * u_B) / 3)
    return lambda u_B: beta_quantile(u_B, alpha, beta)


def shifted(density: Density, shift: float) -> Density:
    """Push time towards noise (`shift` > 1) or towards detail (< 1).

    t' = shift * t / (1 + (shift - 1) * t), after `density` gave t.
    Source: Esser et al. 2024 (SD3), section 5.3.2. Raises ValueError if `shift` <= 0.
    """
    if shift <= 0:
        raise ValueError(f"a shift must be above 0, not {shift}")

    def quantile(u_B: Tensor) -> Tensor:
        t_B = density(u_B)
        return shift * t_B / (1 + (shift - 1) * t_B)

    return quantile


def auto_shift(tokens: int) -> float:
    """The shift for a picture of so many image tokens: exp(mu), mu linear from 0.5 at 256 tokens to 1.15 at 4096.

    Not clamped outside these, as the stock pipelines do not.
    """
    return math.exp(0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5))


def stratified(slot: int, count: int, slots: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` draws of u, float64 on the CPU: one in each of the strata slot, slot + 1, ... of `slots` equal ones.

    When the micro-batches of an optimiser step, over ranks and accumulation, fill all its slots, its mean loss is calmer
    than of free draws; each draw by itself is uniform once slots are dealt evenly.
    """
    if not 0 <= slot <= slot + count <= slots:
        raise ValueError(f"strata {slot} to {slot + count} do not lie within {slots}")
    offset_B = torch.rand(count, dtype=torch.float64, generator=generator)
    return (torch.arange(slot, slot + count, dtype=torch.float64) + offset_B) / slots


def flow_density(flow: Flow, tokens: int) -> Density:
    """What the flow options ask for, for pictures of so many image tokens: the shape first, the shift after it."""
    if flow.flow_use_uniform_schedule:
        shape: Density = uniform
    elif flow.flow_use_beta_schedule:
        shape = beta(flow.flow_beta_schedule_alpha, flow.flow_beta_schedule_beta)
    else:
        shape = logit_normal(flow.flow_sigmoid_scale)
    return shifted(shape, auto_shift(tokens) if flow.flow_schedule_auto_shift else flow.flow_schedule_shift)
