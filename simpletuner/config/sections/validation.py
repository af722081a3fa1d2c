"""Pictures made while training."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Validation"]


class Validation(Section):
    """The gallery: pictures made while training, to see it learn."""

    validation_prompt: str | None = option(None, level="essential")
    """The main prompt. Unset, and no library: no gallery."""

    validation_prompt_library: str | None = option(None, path="input", also=("user_prompt_library",))
    """A JSON file of more prompts: nickname -> prompt."""

    validation_negative_prompt: str = option("")
    """What guidance leads away from."""

    validation_resolution: str | None = option(None, level="essential")
    """Sizes as `1024x1024`, several by comma. Unset: the model's native size."""

    validation_guidance: float | None = option(None, ge=0)
    """Guidance scale; none at 1 and below. Unset: the family's own."""

    validation_num_inference_steps: int | None = option(None, ge=1)
    """Denoising steps of each picture. Unset: the stock pipeline's own."""

    validation_flow_shift: float | None = option(None, gt=0)
    """Shift of the gallery's noise schedule (flow-matching families). Unset: that of the model's shipped scheduler."""

    validation_seed: int | None = option(None, ge=0)
    """Seed of the starting noise, the same for every picture and every time. Unset: `seed`."""

    validation_step_interval: int | None = option(None, ge=0, also=("validation_steps",))
    """Render every so many optimiser steps; 0 only at the end. Unset: `checkpoint_step_interval`."""

    validation_on_startup: bool = option(False)
    """Render before the first step too."""

    disable_benchmark: bool = option(False)
    """Leave out the base model's own pictures of the same prompts (`benchmark/`)."""
