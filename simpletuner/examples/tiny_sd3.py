"""Tiny SD3, SD3.5-medium and SD3.5-large: three text encoders, an autoencoder and a denoiser of four blocks, at 128 px."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from simpletuner.examples.tiny_tokenizers import clip_tokenizer, t5_tokenizer
from simpletuner.families.common import quiet

__all__ = ["PREVIEW", "SD3_VARIANTS", "build_sd3"]

PREVIEW = "taesd3"
"""Folder of the tiny autoencoder, beside the pipeline's parts."""

BLOCKS = 4
WORDS = "a an the of in on with and photo picture painting drawing portrait red green blue yellow cat dog bear square"

SD3_VARIANTS: dict[str, dict[str, Any]] = {
    "sd3": {"dual_attention_layers": (), "qk_norm": None},
    "sd3.5-medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "sd3.5-large": {"dual_attention_layers": (), "qk_norm": "rms_norm"},
}
"""What tells the denoisers of the published models apart, beside their size."""


def build_sd3(folder: Path, variant: str) -> None:
    """Write a variant's pipeline into `folder`."""
    widths = 24, 32
    tokenizers = clip_tokenizer(WORDS), clip_tokenizer(WORDS, pad="!"), t5_tokenizer(WORDS)
    clip_l = clip_model(tokenizers[0], width=widths[0], activation="quick_gelu")
    clip_g = clip_model(tokenizers[1], width=widths[1], activation="gelu")
    t5 = t5_model(tokenizers[2])
    denoiser = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=t5.config.d_model,
        pooled_projection_dim=sum(widths),
        pos_embed_max_size=96,
        **SD3_VARIANTS[variant],
    )
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_l,
        tokenizer=tokenizers[0],
        text_encoder_2=clip_g,
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=tokenizers[2],
    )
    preview: Any = preview_autoencoder()
    with quiet():
        pipeline.save_pretrained(folder)
        preview.save_pretrained(folder / PREVIEW)


def clip_model(tokenizer: CLIPTokenizer, *, width: int, activation: str) -> CLIPTextModelWithProjection:
    """A CLIP text model of three layers, so that the last but one is not the first."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_model(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder of version 1.1, wider than both CLIPs together as the real one is."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_ff=64,
            d_kv=16,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def autoencoder() -> AutoencoderKL:
    """SD3's: eight-fold, 16 channels, no convolution between the posterior and the latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        sample_size=128,
    )


def preview_autoencoder() -> AutoencoderTiny:
    """TAESD3's layout: eight-fold, 16 channels, latents as the denoiser sees them."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        latent_channels=16,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
