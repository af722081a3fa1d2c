"""The Previewer against the release's layout, written out layer by layer."""

from __future__ import annotations

import torch
from torch import nn

from simpletuner.networks.previewer import Previewer

PUBLISHED = {
    0: (512, 16, 1, 1),
    3: (512, 512, 3, 3),
    6: (512, 256, 2, 2),  # transposed: inputs first
    9: (256, 256, 3, 3),
    12: (256, 128, 2, 2),
    15: (128, 128, 3, 3),
    18: (128, 128, 2, 2),
    21: (128, 128, 3, 3),
    24: (3, 128, 1, 1),
}
NORMS = {2: 512, 5: 512, 8: 256, 11: 256, 14: 128, 17: 128, 20: 128, 23: 128}


def test_names_and_shapes_are_the_releases():
    expected = {f"blocks.{number}.weight": shape for number, shape in PUBLISHED.items()}
    expected |= {f"blocks.{number}.bias": (3 if number == 24 else NORMS[number + 2],) for number in PUBLISHED}
    for number, width in NORMS.items():
        expected |= {f"blocks.{number}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        expected |= {f"blocks.{number}.num_batches_tracked": ()}
    with torch.device("meta"):
        weights = Previewer().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected


def test_normalisation_comes_after_the_activation():
    kinds = [type(layer) for layer in Previewer(8).blocks]
    assert kinds[1:24:3] == [nn.GELU] * 8
    assert kinds[2:24:3] == [nn.BatchNorm2d] * 8


def test_a_latent_cell_becomes_eight_by_eight_pixels():
    with torch.no_grad():
        assert Previewer(8).eval()(torch.randn(1, 16, 24, 21)).shape == (1, 3, 192, 168)
