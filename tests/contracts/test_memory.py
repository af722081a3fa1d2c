"""What a training step of each family takes in memory, by counting: every step of recomputation must pay."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.counting import PeakBytes
from simpletuner.data.samples import Place, Prompt
from simpletuner.families import find
from simpletuner.networks.checkpointing import checkpoint_blocks
from simpletuner.training.tuning import build_tuning

LEAST_BLOCKS = 7
"""Of which interval 3 recomputes three, interval 2 four, and interval 1 all."""


def deepened(family: Any, denoiser: Any) -> list[nn.Module]:
    """The denoiser's blocks, made more by copies of its last ones where they are few."""
    blocks = list(family.blocks(denoiser))
    if len(blocks) >= LEAST_BLOCKS:
        return blocks
    [home] = [module for module in denoiser.modules() if isinstance(module, nn.ModuleList) and list(module) == blocks]
    home.extend(copy.deepcopy(blocks[-1]) for _ in range(LEAST_BLOCKS - len(blocks)))
    return list(family.blocks(denoiser))


def batch(family: Any) -> tuple[Any, ...]:
    embeds: list[dict[str, torch.Tensor]] = [{}, {}]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            for merged, new in zip(embeds, encode([Prompt("a cat"), Prompt("", "uncond")]), strict=True):
                merged.update(new)
    edge = family.latent.native_edge_px
    cond = family.collate(embeds, [Place((edge, edge), (edge, edge), (0, 0), (edge, edge))] * 2)
    return torch.randn(2, family.latent.channels, *family.latent.grid(edge, edge)), torch.tensor([0.3, 0.8]), cond


@pytest.mark.parametrize("model_type", ["lora", "full"])
@pytest.mark.parametrize("name", find())
def test_each_recomputed_block_lowers_the_peak_of_a_step(name: str, model_type: str, make_run: Any) -> None:
    family = find()[name](make_run(name, model_type=model_type, gradient_checkpointing=False, lora_dropout=0.0))
    inputs = batch(family)
    peaks = []
    for interval in (None, 3, 2, 1):
        denoiser: Any = family.load_denoiser()
        blocks = deepened(family, denoiser)
        if interval is not None:
            checkpoint_blocks(denoiser, blocks, interval)
        build_tuning(family, denoiser, family.run)
        with PeakBytes() as counted:
            family.predict(denoiser, *inputs).square().mean().backward()
        peaks.append(counted.peak)
    if len({type(block) for block in blocks}) == 1:
        assert all(more > less for more, less in pairwise(peaks)), peaks
    else:  # of blocks of several kinds, every third may hold more than every second
        assert peaks[0] > max(peaks[1:3]), peaks
        assert min(peaks[1:3]) > peaks[3], peaks
