"""Random changes to pictures, on tensors, so that the autoencoder also serves a style and shading it has never seen.

Shape letters:  B batch,  4 red green blue alpha,  3 red green blue,  H W rows and columns. Values in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

__all__ = ["lit", "on_white", "recoloured", "varied"]


def on_white(rgba_B4HW: Tensor) -> Tensor:
    """Composited on white, as the trainer does with transparent pictures."""
    return over(rgba_B4HW, torch.ones_like(rgba_B4HW[:, :3]))


def over(rgba_B4HW: Tensor, ground_B3HW: Tensor) -> Tensor:
    alpha_B1HW = rgba_B4HW[:, 3:]
    return rgba_B4HW[:, :3] * alpha_B1HW + ground_B3HW * (1 - alpha_B1HW)


def varied(rgba_B4HW: Tensor) -> Tensor:
    """Moved, recoloured, lit as if they were solid, and put on white or on something else: (B, 3, H, W)."""
    rgba_B4HW = lit(recoloured(moved(rgba_B4HW)))
    batch = len(rgba_B4HW)
    white = torch.ones_like(rgba_B4HW[:, :3])
    behind = over(rgba_B4HW.roll(1, 0), field(batch, 3, low=0.0, high=1.0))
    plain = torch.rand(batch, 3, 1, 1).expand_as(white)
    draw_B111 = torch.rand(batch, 1, 1, 1)
    ground = torch.where(draw_B111 < 0.6, white, torch.where(draw_B111 < 0.8, plain, behind))
    return over(rgba_B4HW, ground).clamp(0, 1)


def moved(rgba_B4HW: Tensor) -> Tensor:
    """A third as they were; the others scaled, turned a little, shifted and perhaps mirrored."""
    batch = len(rgba_B4HW)
    angle_B = (torch.rand(batch) - 0.5) * math.radians(40)
    scale_B = 0.8 + 0.6 * torch.rand(batch)
    mirror_B = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    shift_B2 = (torch.rand(batch, 2) - 0.5) * 0.3
    matrix_B23 = torch.zeros(batch, 2, 3)
    matrix_B23[:, 0, 0], matrix_B23[:, 0, 1] = angle_B.cos() * scale_B * mirror_B, -angle_B.sin() * scale_B
    matrix_B23[:, 1, 0], matrix_B23[:, 1, 1] = angle_B.sin() * scale_B * mirror_B, angle_B.cos() * scale_B
    matrix_B23[:, :, 2] = shift_B2
    grid = affine_grid(matrix_B23, list(rgba_B4HW.shape), align_corners=False)
    premultiplied = torch.cat([rgba_B4HW[:, :3] * rgba_B4HW[:, 3:], rgba_B4HW[:, 3:]], 1)
    sampled = grid_sample(premultiplied, grid, align_corners=False)
    turned = torch.cat([sampled[:, :3] / sampled[:, 3:].clamp_min(1e-3), sampled[:, 3:]], 1).clamp(0, 1)
    return torch.where(torch.rand(batch, 1, 1, 1) < 0.33, rgba_B4HW, turned)


def recoloured(rgba_B4HW: Tensor) -> Tensor:
    """Half with their channels swapped and their contrast changed."""
    batch = len(rgba_B4HW)
    order_B3 = torch.rand(batch, 3).argsort(1)
    swapped = rgba_B4HW[:, :3].gather(1, order_B3[:, :, None, None].expand(-1, -1, *rgba_B4HW.shape[2:]))
    swapped = swapped.clamp_min(1e-4) ** torch.empty(batch, 1, 1, 1).uniform_(0.6, 1.6)
    rgb = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, rgba_B4HW[:, :3], swapped)
    return torch.cat([rgb, rgba_B4HW[:, 3:]], 1)


def lit(rgba_B4HW: Tensor) -> Tensor:
    """Two thirds with a smooth shade, a coloured one for some, and half of those with a soft highlight."""
    batch = len(rgba_B4HW)
    tint = 1 + (field(batch, 3, low=-0.25, high=0.25) * (torch.rand(batch, 1, 1, 1) < 0.5))
    shaded = rgba_B4HW[:, :3] * field(batch, 1, low=0.4, high=1.25) * tint
    rows = torch.linspace(-1, 1, rgba_B4HW.shape[-1])
    centre_B2 = torch.rand(batch, 2, 1, 1) - 0.6
    width_B = torch.empty(batch, 1, 1).uniform_(0.05, 0.4)
    distance = (rows[None, :, None] - centre_B2[:, 0]) ** 2 + (rows[None, None, :] - centre_B2[:, 1]) ** 2
    glow_BHW = torch.exp(-distance / width_B**2) * (torch.rand(batch, 1, 1) < 0.5) * torch.rand(batch, 1, 1)
    shaded = shaded + (1 - shaded) * glow_BHW[:, None]
    rgb = torch.where(torch.rand(batch, 1, 1, 1) < 0.33, rgba_B4HW[:, :3], shaded.clamp(0, 1))
    return torch.cat([rgb, rgba_B4HW[:, 3:]], 1)


def field(batch: int, channels: int, *, low: float, high: float, edge_px: int = 64) -> Tensor:
    """Smooth random fields between `low` and `high`, coarse and fine ones."""
    cells = int(torch.randint(2, 6, ()))
    coarse = torch.rand(batch, channels, cells, cells)
    return low + (high - low) * interpolate(coarse, size=edge_px, mode="bicubic", align_corners=True).clamp(0, 1)
