"""Stable Cascade's own options."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option
from simpletuner.families.cascade_parts import PROMPT_TOKENS

__all__ = ["StableCascadeOptions"]


class StableCascadeOptions(Section):
    """Stable Cascade's own options."""

    tokenizer_max_length: int = option(PROMPT_TOKENS, ge=1)
    """Tokens of a prompt, padded or cut to: always 77, for CLIP-G reads no others. Another number is told, not obeyed."""

    stable_cascade_loss_weighting: Literal["p2", "adaptive", "none"] = option("p2")
    """How noise levels are weighed: `p2` by 1 / (1 + SNR), as the authors' adapters; `adaptive` so that all levels come to
    count alike, learned while training, as the authors' full fine-tunes; `none`."""

    stable_cascade_schedule_shift: float = option(1.0, gt=0)
    """Shift of the training noise schedule: above 1 noisier, for pictures larger than 1024 px; below 1 more detail."""

    stable_cascade_effnet_encoder: str | None = option(None, path="input")
    """The image encoder's weights, `effnet_encoder.safetensors`, or the folder that holds them. Unset: looked for at the root
    of the decoder's repository, then of the prior's."""

    stable_cascade_image_embed_probability: float = option(0.0, ge=0, le=1)
    """Share of samples that are trained with the CLIP-L embedding of their own picture, as the authors did with 0.1; the others
    hear zeros, as the gallery does. Needs `image_encoder` and `feature_extractor` in the prior's repository."""

    stable_cascade_use_decoder_for_validation: bool = option(True)
    """Make the gallery's pictures with Stages B and A, in full size. false: small pictures by the Previewer network."""

    stable_cascade_decoder_model_name_or_path: str = option("stabilityai/stable-cascade", path="repository")
    """Hub repository or local folder of Stages B and A, of the image encoder and of the Previewer."""

    stable_cascade_decoder_subfolder: str = option("decoder", when="stable_cascade_use_decoder_for_validation=true")
    """Where Stage B lies in it: `decoder`, `decoder_lite`; or the path of a folder of your own that holds one."""

    stable_cascade_decoder_variant: str | None = option(None, when="stable_cascade_use_decoder_for_validation=true")
    """Weight-file variant of Stages B and A, e.g. `bf16` for `*.bf16.safetensors`."""

    stable_cascade_decoder_dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None, when="stable_cascade_use_decoder_for_validation=true"
    )
    """Format of Stage B's weights. Unset: bf16 where the hardware has it, else fp32."""

    stable_cascade_validation_prior_num_inference_steps: int = option(20, ge=1)
    """Denoising steps of Stage C. `validation_num_inference_steps` are Stage B's."""

    stable_cascade_validation_prior_guidance_scale: float | None = option(None, ge=0)
    """Guidance of Stage C; none at 1 and below. Unset: `validation_guidance`, else 4.0."""

    stable_cascade_validation_decoder_guidance_scale: float = option(
        0.0, ge=0, when="stable_cascade_use_decoder_for_validation=true"
    )
    """Guidance of Stage B. Up to 1 there is none: 0.0, 0.5 and 1.0 make the same picture."""
