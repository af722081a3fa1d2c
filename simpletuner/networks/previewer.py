"""Stable Cascade's Previewer: a small network that shows Stage C latents as pictures, without Stage B and A.

Layers and keys are those of the published `previewer.safetensors` (Stability-AI/StableCascade, `modules/previewer.py`).
Shape letters:  B batch,  C channels,  H W rows and columns of latents.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["Previewer"]


class Previewer(nn.Module):
    """Latents (B, 16, H, W) -> RGB (B, 3, 8 H, 8 W), about in [0, 1]."""

    def __init__(self, width: int = 512, latent_channels: int = 16) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.blocks = nn.Sequential(
            *_activated(nn.Conv2d(latent_channels, width, 1), width),
            *_activated(nn.Conv2d(width, width, 3, padding=1), width),
            *_activated(nn.ConvTranspose2d(width, half, 2, stride=2), half),
            *_activated(nn.Conv2d(half, half, 3, padding=1), half),
            *_activated(nn.ConvTranspose2d(half, quarter, 2, stride=2), quarter),
            *_activated(nn.Conv2d(quarter, quarter, 3, padding=1), quarter),
            *_activated(nn.ConvTranspose2d(quarter, quarter, 2, stride=2), quarter),
            *_activated(nn.Conv2d(quarter, quarter, 3, padding=1), quarter),
            nn.Conv2d(quarter, 3, 1),
        )

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        return self.blocks(latents_BCHW)


def _activated(layer: nn.Module, width: int) -> Iterator[nn.Module]:
    yield layer
    yield nn.GELU()
    yield nn.BatchNorm2d(width)  # after the activation, as published
