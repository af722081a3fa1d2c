"""Tiny repositories of the real architectures, with random weights, in the diffusers layout. Built offline in a second.

For tests, examples and dry runs: everything that a family does with a full-size repository it does with these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from simpletuner.errors import UserError
from simpletuner.examples.tiny_sd3 import PREVIEW, SD3_VARIANTS, build_sd3
from simpletuner.examples.tiny_tokenizers import gemma_tokenizer
from simpletuner.families.common import quiet
from simpletuner.families.instruction import stock_instruction

__all__ = ["build_model", "model_options"]

CAPTION_WORDS = (
    "a an the of in on with and photo picture painting drawing portrait red green blue yellow cat dog emoji 3d style"
)


def build_model(family: str, folder: Path, *, seed: int = 0) -> None:
    """Write a tiny repository of `family`, or of a variant such as `sd3.5-medium`, into `folder`; the same for the same seed.

    Raises UserError.
    """
    if family not in BUILDERS:
        raise UserError(f"There is no tiny repository of the family `{family}`.", mend=f"choose from: {', '.join(BUILDERS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"`{folder}` is there already and not empty.",
            why="a repository is written into a folder of its own, and nothing is overwritten.",
            mend="name a new folder, or remove this one first.",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BUILDERS[family](folder)


def model_options(family: str, folder: Path) -> dict[str, str]:
    """The options that name what `build_model` wrote into `folder`."""
    if family == "stable_cascade":  # two repositories, as it was published
        return {
            "pretrained_model_name_or_path": str(folder / "stable-cascade-prior"),
            "stable_cascade_decoder_model_name_or_path": str(folder / "stable-cascade"),
        }
    options = {"pretrained_model_name_or_path": str(folder)}
    if family in SD3_VARIANTS:
        options["sd3_preview_decoder_model_name_or_path"] = str(folder / PREVIEW)
    return options


def build_sana(folder: Path) -> None:
    """Sana at 128 px: a 32x DC-AE, a Gemma of width 32 and a denoiser of two blocks."""
    tokenizer = gemma_tokenizer(" ".join([*stock_instruction(), CAPTION_WORDS]))
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            max_position_embeddings=4096,
            sliding_window=4096,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    # Six stages are five halvings: 32x. The last width is a multiple of the latent channels, as the decoder's shortcut asks.
    widths = (8, 8, 8, 8, 16, 32)
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    multiscales = ((), (), (), (5,), (5,), (5,))
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    denoiser = SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=4,
    )
    # As the published repositories ship it.
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline: Any = SanaPipeline(tokenizer, text_encoder, vae, denoiser, scheduler)
    with quiet():
        pipeline.save_pretrained(folder)


def build_cascade(folder: Path) -> None:
    """Stable Cascade: two repositories in one folder."""
    from simpletuner.examples.tiny_cascade import build_stable_cascade

    build_stable_cascade(folder, CAPTION_WORDS)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "sana": build_sana,
    **{variant: partial(build_sd3, variant=variant) for variant in SD3_VARIANTS},
    "stable_cascade": build_cascade,
}
