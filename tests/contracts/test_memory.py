"""What a training step of each family takes in memory, by counting: every step of recomputation must pay."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from simpletuner.data.samples import Place, Prompt
from simpletuner.families import find
from simpletuner.networks.checkpointing import checkpoint_blocks
from simpletuner.networks.counting import PeakBytes
from simpletuner.training.tuning import build_tuning

COPIES = 6
"""Twelve samples: in full tuning of a network so small the gradients of its weights would else hide the activations."""
LEAST_BLOCKS = 7
"""Of which interval 3 recomputes three, interval 2 four, and interval 1 all."""


def deepened(family: Any, denoiser: Any) -> list[nn.Module]:
    """The denoiser's blocks, made more by copies of the first where they are few (the last may be unlike the others)."""
    blocks = list(family.blocks(denoiser))
    if len(blocks) >= LEAST_BLOCKS:
        return blocks
    [home] = [module for module in denoiser.modules() if isinstance(module, nn.ModuleList) and list(module) == blocks]
    for _ in range(LEAST_BLOCKS - len(blocks)):
        home.insert(0, copy.deepcopy(blocks[0]))
    return list(family.blocks(denoiser))


def encoded(family: Any) -> list[dict[str, torch.Tensor]]:
    """Embeds of two prompts, those of all encoders together."""
    embeds: list[dict[str, torch.Tensor]] = [{}, {}]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            for merged, new in zip(embeds, encode([Prompt("a cat"), Prompt("", "uncond")]), strict=True):
                merged.update(new)
    return embeds


def batch(family: Any) -> tuple[Any, ...]:
    embeds = encoded(family) * COPIES
    edge = family.latent.native_edge_px
    cond = family.collate(embeds, [Place((edge, edge), (edge, edge), (0, 0), (edge, edge))] * len(embeds))
    x_BCHW = torch.randn(len(embeds), family.latent.channels, *family.latent.grid(edge, edge))
    return x_BCHW, torch.linspace(0.3, 0.8, len(embeds)), cond


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


def latents_of(family: Any, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    keys = [f"{number:032x}" for number in range(len(pixels_B3HW))]
    with family.image_encoder().lent("cpu") as encode:
        return encode(pixels_B3HW, keys)


@pytest.mark.parametrize("name", find())
def test_offloaded_encoders_give_the_same_embeds_and_latents(name: str, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visits, bring = [], ModuleGroup.onload_
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: (visits.append(group), bring(group)))
    edge, results = 128, []
    pixels_B3HW = torch.rand(2, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for is_offloaded in (False, True):
        family = find()[name](make_run(name, offload_during_startup=is_offloaded))
        first, second = encoded(family)
        results.append([*first.values(), *second.values(), latents_of(family, pixels_B3HW)])
        assert bool(visits) is is_offloaded
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("name", find())
def test_slices_give_what_batches_of_one_do_and_tiles_are_part_of_the_recipe(name: str, make_run: Any) -> None:
    pixels_B3HW = torch.rand(2, 3, 768, 640, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, sliced, tiled = (
        find()[name](make_run(name, **options)) for options in ({}, {"vae_enable_slicing": True}, {"vae_enable_tiling": True})
    )
    whole = latents_of(plain, pixels_B3HW[:1])
    assert torch.equal(latents_of(sliced, pixels_B3HW)[:1], whole)
    assert sliced.image_encoder().recipe.digest == plain.image_encoder().recipe.digest
    in_tiles = latents_of(tiled, pixels_B3HW[:1])
    if tiled.image_encoder().recipe.digest == plain.image_encoder().recipe.digest:
        assert torch.equal(in_tiles, whole)
    else:
        assert in_tiles.shape == whole.shape
        corner = whole.shape[-1] // 3  # within the first tile, which knows nothing of the others
        assert (in_tiles - whole)[..., :corner, :corner].abs().mean() < 0.2 * whole.std()
        assert not torch.equal(in_tiles, whole)
