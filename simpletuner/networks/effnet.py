"""Stable Cascade's image encoder: EfficientNetV2-S features and a 1x1 mapper to 16 normalised channels, in plain torch.

State-dict keys are torchvision's (`features` as `backbone`), so torchvision, whose wheels fit one torch alone, is not needed.
Stochastic depth acts in training only; this encoder is always frozen. Source: Tan and Le 2021, table 4.
Shape letters:  B batch,  C channels,  H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MINIATURE", "PUBLISHED", "EfficientNetEncoder", "Layout", "Stage", "layout_of"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in [0, 1]: what the backbone was trained on."""


@dataclass(frozen=True)
class Stage:
    """Blocks of one width, the first of which may halve the picture."""

    is_fused: bool
    """Fused blocks have one 3x3 convolution where the others have a 1x1 and a depthwise one, with squeeze and excitation."""
    expansion: int
    stride: int
    width: int
    blocks: int


@dataclass(frozen=True)
class Layout:
    """How wide and deep a network is."""

    stem: int
    stages: tuple[Stage, ...]
    head: int
    latent_channels: int = 16


PUBLISHED = Layout(
    24,
    (
        Stage(True, 1, 1, 24, 2),
        Stage(True, 4, 2, 48, 4),
        Stage(True, 4, 2, 64, 4),
        Stage(False, 4, 2, 128, 6),
        Stage(False, 6, 1, 160, 9),
        Stage(False, 6, 2, 256, 15),
    ),
    1280,
)
"""EfficientNetV2-S: 20 M parameters."""

MINIATURE = Layout(
    4,
    (
        Stage(True, 1, 1, 4, 1),
        Stage(True, 2, 2, 6, 1),
        Stage(True, 2, 2, 8, 1),
        Stage(False, 2, 2, 8, 2),
        Stage(False, 2, 1, 8, 1),
        Stage(False, 2, 2, 12, 1),
    ),
    24,
)
"""The same network in small, for tests and dry runs: same parts, same stride of 32."""


def layout_of(weights: Mapping[str, Tensor]) -> Layout | None:
    """The layout that a state dict was made for, by the width of its stem; None if there is none such.

    A fixed table, not inference from shapes: weights that lack whole blocks must not pass for a shallower network.
    """
    stem = weights.get("backbone.0.0.weight")
    return next((layout for layout in (PUBLISHED, MINIATURE) if stem is not None and len(stem) == layout.stem), None)


class EfficientNetEncoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 32, W / 32), of mean 0 and deviation 1 on the training data."""

    def __init__(self, layout: Layout = PUBLISHED) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*_features(layout))
        # The running statistics are the only normalisation of the latents.
        self.mapper = nn.Sequential(
            nn.Conv2d(layout.head, layout.latent_channels, 1, bias=False), nn.BatchNorm2d(layout.latent_channels, affine=False)
        )

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        mean_3, std_3 = torch.tensor([MEAN, STD]).to(pixels_B3HW)
        colours_B3HW = ((pixels_B3HW + 1) / 2 - mean_3[:, None, None]) / std_3[:, None, None]
        return self.mapper(self.backbone(colours_B3HW))


def _features(layout: Layout) -> Iterator[nn.Module]:
    yield _convolution(3, layout.stem, stride=2)
    width = layout.stem
    for stage in layout.stages:
        blocks = []
        for number in range(stage.blocks):
            blocks.append(_Block(stage, width, stage.stride if number == 0 else 1))
            width = stage.width
        yield nn.Sequential(*blocks)
    yield _convolution(width, layout.head, kernel=1)


def _convolution(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1, is_activated: bool = True
) -> nn.Sequential:
    """Convolution, normalisation, activation, numbered as torchvision numbers them."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.SiLU()] if is_activated else []))


class _Block(nn.Module):
    """Expand, mix in space, project back; a shortcut where the shapes allow one."""

    def __init__(self, stage: Stage, inputs: int, stride: int) -> None:
        super().__init__()
        wide, outputs = inputs * stage.expansion, stage.width
        layers: list[nn.Module] = []
        if not stage.is_fused:
            layers = [
                _convolution(inputs, wide, kernel=1),
                _convolution(wide, wide, stride=stride, groups=wide),
                _SqueezeExcitation(wide, max(1, inputs // 4)),
                _convolution(wide, outputs, kernel=1, is_activated=False),
            ]
        elif stage.expansion == 1:
            layers = [_convolution(inputs, outputs, stride=stride)]
        else:
            layers = [_convolution(inputs, wide, stride=stride), _convolution(wide, outputs, kernel=1, is_activated=False)]
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        answer_BCHW = self.block(x_BCHW)
        return x_BCHW + answer_BCHW if self.has_shortcut else answer_BCHW


class _SqueezeExcitation(nn.Module):
    """Each channel is scaled by what the picture's mean colours say of it."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mean_BC11 = x_BCHW.mean((2, 3), keepdim=True)
        return x_BCHW * torch.sigmoid(self.fc2(nn.functional.silu(self.fc1(mean_BC11))))
