"""Tiny repositories of Stable Cascade, in the layout of its two real ones, side by side in one folder.

`stable-cascade-prior` holds Stage C and its lite kin, `stable-cascade` Stages B and A, the image encoder and the Previewer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.models import StableCascadeUNet
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from simpletuner.examples.tiny_tokenizers import clip_tokenizer
from simpletuner.families.cascade_pictures import undisturbed
from simpletuner.families.common import quiet
from simpletuner.networks.effnet import MINIATURE, EfficientNetEncoder
from simpletuner.networks.previewer import Previewer

__all__ = ["DECODER", "PRIOR", "build_stable_cascade"]

PRIOR = "stable-cascade-prior"
DECODER = "stable-cascade"
TEXT_WIDTH = 32
IMAGE_WIDTH = 24
WITH_ATTENTION = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


def build_stable_cascade(folder: Path, words: str) -> None:
    """Both repositories. `words` are known to the tokenizer whole."""
    tokenizer = clip_tokenizer(words)
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=TEXT_WIDTH,
            hidden_act="gelu",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    both: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": text_encoder, "scheduler": DDPMWuerstchenScheduler()}
    with quiet(), undisturbed():
        from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline
        from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

        stage_c: Any = StableCascadePriorPipeline(prior=prior(layers=2), **image_parts(), **both)
        stage_c.save_pretrained(folder / PRIOR)
        prior(layers=1).save_pretrained(folder / PRIOR / "prior_lite")
        vqgan = PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)
        stages_b_a: Any = StableCascadeDecoderPipeline(decoder=decoder(width=8), vqgan=vqgan, **both)
        stages_b_a.save_pretrained(folder / DECODER)
        decoder(width=4).save_pretrained(folder / DECODER / "decoder_lite")
    save(calibrated(EfficientNetEncoder(MINIATURE)), folder / DECODER / "effnet_encoder.safetensors")
    save(Previewer(width=8), folder / DECODER / "previewer.safetensors")


def image_parts() -> dict[str, Any]:
    """What tells the prior of a picture: CLIP-L and how pictures are prepared for it, at 32 px."""
    with undisturbed():
        from transformers import CLIPImageProcessor

        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.random.fork_rng(devices=[]):  # the other networks are what they were before this one came
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=IMAGE_WIDTH,
                image_size=32,
                patch_size=8,
            )
        )
    return {"feature_extractor": processor, "image_encoder": encoder}


def prior(layers: int) -> StableCascadeUNet:
    """Stage C: two levels of one size, as published."""
    return StableCascadeUNet(
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, layers),
        up_num_layers_per_block=(layers, 1),
        switch_level=(False,),
        clip_image_in_channels=IMAGE_WIDTH,
        clip_text_in_channels=TEXT_WIDTH,
        clip_text_pooled_in_channels=TEXT_WIDTH,
    )


def decoder(width: int) -> StableCascadeUNet:
    """Stage B: four levels, attention in the lower two, told of Stage C's latents."""
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        conditioning_dim=16,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        num_attention_heads=(-1, -1, 2, 2),
        down_num_layers_per_block=(1, 1, 1, 1),
        up_num_layers_per_block=(1, 1, 1, 1),
        down_blocks_repeat_mappers=(1, 1, 1, 1),
        up_blocks_repeat_mappers=(3, 3, 2, 2),
        block_types_per_layer=(*(WITH_ATTENTION[:2],) * 2, *(WITH_ATTENTION,) * 2),
        clip_text_pooled_in_channels=TEXT_WIDTH,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        dropout=(0, 0, 0.1, 0.1),
        timestep_conditioning_type=("sca",),
    )


def calibrated(encoder: nn.Module) -> nn.Module:
    """Running statistics of some smooth random pictures, so that latents have mean 0 and deviation 1 as the real ones."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what is seen
    pictures_B3HW = nn.functional.interpolate(torch.rand(16, 3, 6, 6) * 2 - 1, size=(192, 192), mode="bilinear")
    with torch.no_grad():
        encoder.train()(pictures_B3HW)
    return encoder.eval()


def save(module: nn.Module, path: Path) -> None:
    """As the release keeps it: a state dict without a configuration."""
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
