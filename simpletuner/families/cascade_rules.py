"""What may be wrong with a run for Stable Cascade, and what its user should know: pure functions of the options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from simpletuner.config.run import Run
from simpletuner.errors import Problem
from simpletuner.families.cascade_parts import PROMPT_TOKENS

if TYPE_CHECKING:
    from simpletuner.families.stable_cascade import StableCascadeOptions

__all__ = ["notices", "problems"]


def problems(run: Run) -> Iterator[Problem]:
    """What refuses the run."""
    if run.precision.mixed_precision != "no":
        yield Problem(
            "mixed_precision",
            f'Stable Cascade Stage C requires --mixed_precision=no, but it is "{run.precision.mixed_precision}".',
            why="weights loaded in bf16 barely learn, and fp16 overflows in its response norms.",
            mend='set "mixed_precision" to "no", or add "i_know_what_i_am_doing": true to go on at your own risk, with '
            "float32 weights under autocast.",
            overridable=True,
        )
    elif run.dtypes.base == "float16":
        what = '`base_model_default_dtype` is "fp16", in which Stable Cascade\'s response norms overflow.'
        yield Problem("base_model_default_dtype", what, mend='leave it at "fp32".', overridable=True)
    flow = (*type(run.flow).model_fields, "validation_flow_shift")
    for name in (each for each in flow if run.sources.get(each, "core") not in ("core", "family", "derived")):
        yield Problem(
            name,
            f"`{name}` has no effect on Stable Cascade, which is no flow-matching model.",
            mend="remove it; `stable_cascade_schedule_shift` shifts this model's schedule.",
        )


def notices(run: Run, options: StableCascadeOptions) -> Iterator[str]:
    """What the user should know."""
    if (tokens := options.tokenizer_max_length) != PROMPT_TOKENS:
        yield f"`tokenizer_max_length` {tokens} is overridden: CLIP-G reads {PROMPT_TOKENS} tokens, always."
    if run.memory.vae_enable_tiling:
        yield (
            "`vae_enable_tiling` has no effect on Stable Cascade: its image encoder weighs channels by their mean over the "
            "whole picture, which tiles would change, and its pictures have no decoder in tiles."
        )
    if run.validation.has_gallery:
        yield from _idle_settings(run, options)


def _idle_settings(run: Run, options: StableCascadeOptions) -> Iterator[str]:
    """What is written of the gallery's pictures and alters none of them."""
    prior_guidance = options.stable_cascade_validation_prior_guidance_scale
    guidance = run.validation.validation_guidance
    if prior_guidance is not None and guidance not in (None, prior_guidance):
        yield (
            f"`validation_guidance` {guidance:g} is not used: "
            f"`stable_cascade_validation_prior_guidance_scale` {prior_guidance:g} wins, and Stage B has its own."
        )
    has_decoder = options.stable_cascade_use_decoder_for_validation
    decoder_guidance = options.stable_cascade_validation_decoder_guidance_scale
    if has_decoder and 0 < decoder_guidance <= 1:
        yield (
            f"`stable_cascade_validation_decoder_guidance_scale` {decoder_guidance:g} makes the same pictures as 0: "
            "the stock decoder guides above 1 only."
        )
    if not has_decoder and run.validation.validation_num_inference_steps is not None:
        yield (
            "`validation_num_inference_steps` is Stage B's, and the Previewer paints in its stead: only "
            "`stable_cascade_validation_prior_num_inference_steps` counts."
        )
