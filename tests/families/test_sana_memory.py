"""What Sana's encoders take in memory, and that the options that lower it change no picture."""

from __future__ import annotations

import torch

from simpletuner.families.sana import Sana
from simpletuner.networks.counting import PeakBytes


def pictures(edge_px: int, count: int = 1) -> torch.Tensor:
    """Smooth ones, as pictures are."""
    rows = torch.linspace(-1, 1, edge_px)
    waves = [torch.sin(3 * rows[:, None] + phase) * torch.cos(4 * rows[None] - phase) for phase in range(3 * count)]
    return torch.stack(waves).view(count, 3, edge_px, edge_px)


def encoded(make_run, pixels_B3HW, **memory):
    """Latents, and the bytes that encoding took at most, weights aside."""
    with Sana(make_run("sana", **memory)).image_encoder().lent("cpu") as encode:
        encode(pixels_B3HW[:1, :, :128, :128], [""])  # loads
        with PeakBytes() as counted:
            latents = encode(pixels_B3HW, [""] * len(pixels_B3HW))
    return latents, counted.peak


def test_tiles_take_less_memory_and_agree_within_each(make_run):
    whole, whole_bytes = encoded(make_run, pictures(768))
    tiled, tiled_bytes = encoded(make_run, pictures(768), vae_enable_tiling=True)
    assert tiled.shape == whole.shape == (1, 32, 24, 24)
    assert tiled_bytes < 0.6 * whole_bytes
    far_from_seams = tiled[:, :, :8, :8] - whole[:, :, :8, :8]
    assert far_from_seams.square().mean() < 0.02 * whole.square().mean()
    small, _ = encoded(make_run, pictures(512))
    assert torch.equal(encoded(make_run, pictures(512), vae_enable_tiling=True)[0], small), "one tile is the whole"


def test_tiled_latents_are_cached_apart_and_sliced_ones_are_not(make_run):
    digests = [
        Sana(make_run("sana", **memory)).image_encoder().recipe.digest
        for memory in ({}, {"vae_enable_slicing": True}, {"vae_enable_tiling": True})
    ]
    assert digests[0] == digests[1] != digests[2]


def test_slices_take_the_memory_of_one_picture_and_give_what_a_batch_of_one_does(make_run):
    four = pictures(128, 4)
    together, together_bytes = encoded(make_run, four)
    sliced, sliced_bytes = encoded(make_run, four, vae_enable_slicing=True)
    assert sliced_bytes < 0.4 * together_bytes
    assert torch.equal(sliced, torch.cat([encoded(make_run, one[None])[0] for one in four]))
    torch.testing.assert_close(sliced, together, atol=1e-5, rtol=1e-4)


def test_pictures_are_decoded_in_tiles_too(make_run):
    family, latents = Sana(make_run("sana", vae_enable_tiling=True)), torch.randn(1, 32, 24, 18)
    with PeakBytes() as counted, family.image_decoder("cpu") as decode:
        assert decode(latents, {}, {}).size == (576, 768)
    with PeakBytes() as whole, Sana(make_run("sana")).image_decoder("cpu") as decode:
        assert decode(latents, {}, {}).size == (576, 768)
    assert counted.peak < 0.8 * whole.peak
