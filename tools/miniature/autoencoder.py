"""The miniature's autoencoder: DC-AE with three halvings, 64 px -> 8 x 8 latents of 16 channels.
Shape letters:  B batch,  C latent channels,  H W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from miniature.augment import varied

__all__ = ["build", "encode", "psnr_db", "train"]

LATENT_CHANNELS = 16
# No layer at full resolution, where one is dearest: the first convolution halves. Shortcuts ask that widths divide so.
WIDTHS = (32, 32, 64, 128)
ENCODER_LAYERS = (0, 1, 1, 1)
DECODER_LAYERS = (0, 2, 2, 2)
LATENT_NOISE = 0.15
"""Most noise that is added before decoding, in parts of the latents' spread: a denoiser's answers are never exact."""


def build() -> Any:
    blocks = ("ResBlock",) * len(WIDTHS)
    multiscales: tuple[tuple[int, ...], ...] = ((),) * len(WIDTHS)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=16,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=ENCODER_LAYERS,
        decoder_layers_per_block=DECODER_LAYERS,
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def train(
    vae: Any,
    rgba_N4HW: Tensor,
    *,
    steps: int,
    learning_rate: float,
    final_share: float,
    batch: int,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """AdamW with a cosine from `learning_rate` down to `final_share` of it; `report(step, facts)` every 50 steps."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    sums: dict[str, float] = {}
    for step in range(1, steps + 1):
        share = final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, step / 100) * share
        pixels_B3HW = varied(rgba_N4HW[torch.randint(len(rgba_N4HW), (batch,))]) * 2 - 1
        pixels_B3HW = pixels_B3HW.contiguous(memory_format=torch.channels_last)
        facts = losses(vae, pixels_B3HW)
        loss = facts["absolute"] + facts["edges"] + 2 * facts["squared"] + 0.02 * facts["spread"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in facts.items():
            sums[name] = sums.get(name, 0.0) + value.item() / 50
        if step % 50 == 0:
            report(step, sums)
            sums = {}


def losses(vae: Any, pixels_B3HW: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        latents_BCHW = vae.encode(pixels_B3HW).latent
        noise = torch.randn_like(latents_BCHW) * torch.rand(len(latents_BCHW), 1, 1, 1) * LATENT_NOISE
        answer_B3HW = vae.decode(latents_BCHW + noise).sample
    error = answer_B3HW.float() - pixels_B3HW
    latents_BCHW = latents_BCHW.float()
    std_C = latents_BCHW.std((0, 2, 3))
    return {
        "absolute": error.abs().mean(),
        "squared": error.square().mean(),
        "edges": error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
        # Every channel near mean 0 and spread 1: what the denoiser finds easiest, and one scale serves all.
        "spread": latents_BCHW.mean((0, 2, 3)).square().mean() + std_C.clamp_min(1e-3).log().square().mean(),
    }


@torch.no_grad()
def encode(vae: Any, pixels_B3HW: Tensor) -> Tensor:
    """Latents of pictures in [0, 1], unscaled, in float32."""
    return torch.cat([vae.encode(part * 2 - 1).latent for part in pixels_B3HW.split(64)])


@torch.no_grad()
def psnr_db(vae: Any, pixels_B3HW: Tensor) -> Tensor:
    """Each picture's reconstruction error as peak signal to noise, in float32."""
    answer = torch.cat([vae.decode(part).sample for part in encode(vae, pixels_B3HW).split(64)])
    squared_B = ((answer.clamp(-1, 1) + 1) / 2 - pixels_B3HW).square().mean((1, 2, 3))
    return -10 * squared_B.log10()
