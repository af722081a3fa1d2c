"""What SD3's tests share: prompts, a shot, and how it is painted by the stock pipeline."""

from __future__ import annotations

import torch
from diffusers import StableDiffusion3Pipeline

from simpletuner.config.run import Dtypes
from simpletuner.data.samples import Prompt
from simpletuner.families.base import Shot
from simpletuner.families.sd3 import StableDiffusion3

BF16 = Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16")
PROMPTS = ["A Photo of a CAT", "", "two dogs, 犬🐶, in the RAIN!\n", "word " * 400]
SHOT = Shot("n", 0, "a cat", "blurry", width_px=128, height_px=96, seed=5, guidance=4.5, steps=6)
VARIANTS = ["sd3", "sd3.5-medium", "sd3.5-large"]
TOKENS = {"max_sequence_length": 154}


def encoded(family: StableDiffusion3, prompts: list[Prompt]) -> list[dict[str, torch.Tensor]]:
    merged: list[dict[str, torch.Tensor]] = [{} for _ in prompts]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            for one, part in zip(merged, encode(prompts), strict=True):
                one.update(part)
    return merged


def paint(pipeline: StableDiffusion3Pipeline, **settings: object) -> torch.Tensor:
    """SHOT by the stock pipeline, from the text on."""
    arguments = {"negative_prompt": "blurry", "num_inference_steps": 6, "guidance_scale": 4.5, **TOKENS, **settings}
    generator = torch.Generator("cpu").manual_seed(5)
    return pipeline("a cat", width=128, height=96, generator=generator, output_type="latent", **arguments).images
