"""The image encoder against torchvision's published layout, and against torchvision itself where it can be imported."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from simpletuner.networks.effnet import MEAN, MINIATURE, PUBLISHED, STD, EfficientNetEncoder, layout_of


def of_convolution(name: str, outputs: int, inputs: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's Conv2dNormActivation."""
    norms = {f"{name}.1.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.0.weight": (outputs, inputs, kernel, kernel), **norms, f"{name}.1.num_batches_tracked": ()}


def published() -> dict[str, tuple[int, ...]]:
    """torchvision's `efficientnet_v2_s().features`, written out: per block its number, inputs, outputs and inner width."""
    names = of_convolution("0", 24, 3, 3)
    fused = {1: [(24, 24, None)] * 2, 2: [(24, 48, 96), *[(48, 48, 192)] * 3], 3: [(48, 64, 192), *[(64, 64, 256)] * 3]}
    for stage, blocks in fused.items():
        for number, (inputs, outputs, wide) in enumerate(blocks):
            block = f"{stage}.{number}.block"
            names |= of_convolution(f"{block}.0", wide or outputs, inputs, 3)
            names |= of_convolution(f"{block}.1", outputs, wide, 1) if wide else {}
    inverted = {
        4: [(64, 128, 256, 16), *[(128, 128, 512, 32)] * 5],
        5: [(128, 160, 768, 32), *[(160, 160, 960, 40)] * 8],
        6: [(160, 256, 960, 40), *[(256, 256, 1536, 64)] * 14],
    }
    for stage, deep in inverted.items():
        for number, (inputs, outputs, wide, squeezed) in enumerate(deep):
            block = f"{stage}.{number}.block"
            names |= of_convolution(f"{block}.0", wide, inputs, 1)
            names |= of_convolution(f"{block}.1", wide, 1, 3)
            names |= {f"{block}.2.fc1.weight": (squeezed, wide, 1, 1), f"{block}.2.fc1.bias": (squeezed,)}
            names |= {f"{block}.2.fc2.weight": (wide, squeezed, 1, 1), f"{block}.2.fc2.bias": (wide,)}
            names |= of_convolution(f"{block}.3", outputs, wide, 1)
    return names | of_convolution("7", 1280, 256, 1)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_names_and_shapes_are_torchvisions_published_ones_and_the_mapper():
    with torch.device("meta"):
        encoder = EfficientNetEncoder(PUBLISHED)
    features = {f"backbone.{name}": shape for name, shape in published().items()}
    mapper = {
        "mapper.0.weight": (16, 1280, 1, 1),
        "mapper.1.running_mean": (16,),
        "mapper.1.running_var": (16,),
        "mapper.1.num_batches_tracked": (),
    }
    assert shapes(encoder) == features | mapper
    assert len(encoder.state_dict()) == 784
    # torchvision's documentation gives 21,458,488 for the whole network, 1,281,000 of them in the classifier.
    assert sum(weight.numel() for weight in encoder.backbone.parameters()) == 21_458_488 - 1_281_000


def test_normalisation_has_the_published_epsilons():
    with torch.device("meta"):
        encoder = EfficientNetEncoder(PUBLISHED)
    assert {module.eps for module in encoder.backbone.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    assert encoder.mapper[1].eps == 1e-5


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed, nor needed")
def test_features_equal_torchvisions():
    from torchvision.models import efficientnet_v2_s

    theirs = efficientnet_v2_s(weights=None).features.eval()
    ours = EfficientNetEncoder().eval()
    ours.backbone.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(ours.backbone(pixels), theirs(pixels))


def functional(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The miniature by torch's functions alone, layer by layer, straight from the paper's figures 2 and table 4."""

    def convolution(name: str, x: torch.Tensor, stride: int = 1, activate: bool = True) -> torch.Tensor:
        kernel = weights[f"{name}.0.weight"]
        groups = x.shape[1] // kernel.shape[1]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        mean, var, scale, shift = (
            weights[f"{name}.1.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-3).sqrt() * scale + shift
        return x * torch.sigmoid(x) if activate else x

    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    x = convolution("backbone.0", (pixels * 0.5 + 0.5 - mean) / std, 2)
    x = x + convolution("backbone.1.0.block.0", x)
    for stage in (2, 3):
        x = convolution(f"backbone.{stage}.0.block.1", convolution(f"backbone.{stage}.0.block.0", x, 2), activate=False)
    for block, stride, shortcut in (("4.0", 2, False), ("4.1", 1, True), ("5.0", 1, True), ("6.0", 2, False)):
        name = f"backbone.{block}.block"
        y = convolution(f"{name}.1", convolution(f"{name}.0", x), stride)
        squeezed = F.conv2d(y.mean((2, 3), keepdim=True), weights[f"{name}.2.fc1.weight"], weights[f"{name}.2.fc1.bias"])
        squeezed = squeezed * torch.sigmoid(squeezed)
        y = y * torch.sigmoid(F.conv2d(squeezed, weights[f"{name}.2.fc2.weight"], weights[f"{name}.2.fc2.bias"]))
        y = convolution(f"{name}.3", y, activate=False)
        x = x + y if shortcut else y
    x = F.conv2d(convolution("backbone.7", x), weights["mapper.0.weight"])
    mean, var = (weights[f"mapper.1.running_{part}"][:, None, None] for part in ("mean", "var"))
    return (x - mean) / (var + 1e-5).sqrt()


def test_the_forward_pass_is_the_papers():
    torch.manual_seed(0)
    encoder = EfficientNetEncoder(MINIATURE).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    pixels = torch.rand(2, 3, 96, 64) * 2 - 1
    with torch.no_grad():
        latents = encoder(pixels)
    assert latents.shape == (2, 16, 3, 2)
    torch.testing.assert_close(latents, functional(encoder.state_dict(), pixels), atol=1e-4, rtol=1e-4)


def test_the_stem_tells_the_layout_and_nothing_is_inferred():
    for layout in (PUBLISHED, MINIATURE):
        with torch.device("meta"):
            weights = EfficientNetEncoder(layout).state_dict()
        assert layout_of(weights) is layout
        fewer = {name: tensor for name, tensor in weights.items() if not name.startswith("backbone.6.")}
        assert layout_of(fewer) is layout
    assert layout_of({}) is None
    assert layout_of({"backbone.0.0.weight": torch.zeros(32, 3, 3, 3)}) is None
