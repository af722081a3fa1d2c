"""The miniature's denoiser, a Sana of 2.7 M parameters, and its training together with the text encoder.

Shape letters:  B batch,  N pictures,  C latent channels,  H W rows and columns,  L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Model

from miniature.text import Prompts
from simpletuner.diffusion.density import logit_normal, shifted, stratified
from simpletuner.networks.linear_attention import LinearAttention

__all__ = ["Pair", "build", "train"]

CAPTION_DROPOUT = 0.1
WARMUP_STEPS = 200
AVERAGE = 0.999
"""What ships is the running average of the weights."""


def build(latent_channels: int, text_width: int) -> Any:
    denoiser: Any = SanaTransformer2DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=4,
        num_attention_heads=6,
        attention_head_dim=32,
        num_cross_attention_heads=6,
        cross_attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=text_width,
        sample_size=8,
        # Positions by sines, as Sana's 2K models have them: without, so few layers hardly know where they draw.
        interpolation_scale=1.0,
    )
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(LinearAttention())
    return denoiser


@dataclass(frozen=True)
class Pair:
    """What is trained together."""

    denoiser: nn.Module
    text_encoder: Gemma2Model

    def parameters(self) -> list[nn.Parameter]:
        return [*self.denoiser.parameters(), *self.text_encoder.parameters()]

    def averaged(self) -> Pair:
        return Pair(copy.deepcopy(self.denoiser).requires_grad_(False), copy.deepcopy(self.text_encoder).requires_grad_(False))


def train(
    pair: Pair,
    latents_NCHW: Tensor,
    prompts: Prompts,
    *,
    steps: int,
    learning_rate: float,
    batch: int,
    decay_steps: int,
    report: Callable[[int, float, Pair], None],
) -> None:
    """AdamW at one learning rate, which falls to zero over the last `decay_steps`.

    `report(step, loss, averaged weights)` is called every 100 steps.
    Workers share each step: all begin with the same weights, draw samples of their own and average the gradients.
    """
    average = pair.averaged()
    density = shifted(logit_normal(), 3.0)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    order_N = torch.randperm(len(latents_NCHW))
    place, loss_sum = 0, 0.0
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, step / WARMUP_STEPS, (steps - step) / max(1, decay_steps))
        if place + batch > len(order_N):
            order_N, place = torch.randperm(len(latents_NCHW)), 0
        rows_B = order_N[place : place + batch]
        place += batch
        t_B = density(stratified(0, batch, batch)).float()
        # Each picture has two captions: the second half of the rows are those with its colour.
        captions_B = rows_B + len(latents_NCHW) * torch.randint(2, (batch,))
        loss = flow_loss(pair, latents_NCHW[rows_B], captions_B, prompts, t_B)
        loss.backward()
        average_gradients(pair.parameters())
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            share = min(AVERAGE, step / (step + 10))
            torch._foreach_lerp_(average.parameters(), pair.parameters(), 1 - share)
        loss_sum += loss.item()
        if step % 100 == 0:
            report(step, loss_sum / 100, average)
            loss_sum = 0.0


def average_gradients(parameters: list[nn.Parameter]) -> None:
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def flow_loss(pair: Pair, clean_BCHW: Tensor, captions_B: Tensor, prompts: Prompts, t_B: Tensor) -> Tensor:
    """Mean squared error of the velocity, noise minus clean, at times `t_B`; one caption in ten is dropped."""
    dropped_B = torch.rand(len(captions_B)) < CAPTION_DROPOUT
    captions_B = torch.where(dropped_B, len(prompts.ids_NL) - 1, captions_B)
    noise_BCHW = torch.randn_like(clean_BCHW)
    t_B111 = t_B[:, None, None, None]
    noisy_BCHW = (1 - t_B111) * clean_BCHW + t_B111 * noise_BCHW
    with torch.autocast("cpu", torch.bfloat16):
        embeds_BLD, shown_BL = prompts.embeds(pair.text_encoder, captions_B)
        answer_BCHW = pair.denoiser(
            hidden_states=noisy_BCHW,
            encoder_hidden_states=embeds_BLD,
            encoder_attention_mask=shown_BL,
            timestep=t_B * 1000,
            return_dict=False,
        )[0]
    return (answer_BCHW.float() - (noise_BCHW - clean_BCHW)).square().mean()
