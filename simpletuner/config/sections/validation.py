"""Pictures made while training."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Validation"]


class Validation(Section):
    """The gallery: pictures made while training, to see it learn."""

    validation_prompt: str | None = option(None, level="essential")
    """The main prompt. Unset, and no library: no gallery."""

    validation_prompt_library: bool | str | None = option(None, path="input", also=("user_prompt_library",))
    """A JSON file of more prompts: nickname -> prompt, or -> an object of `prompt` and `adapter_strength`, the weight at which
    the trained adapter counts in that picture (1 as trained, 0 not at all). true: the bundled set of general prompts."""

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
    """Render every so many optimiser steps; 0 only at the end. Unset: `checkpoint_step_interval`, or 0 if an epoch interval
    is set."""

    validation_epoch_interval: float | None = option(None, ge=0)
    """Render every so many epochs, beside `validation_step_interval`; 0.5 is twice an epoch, at the first step that has come so
    far."""

    validation_on_startup: bool = option(False)
    """Render before the first step too."""

    disable_benchmark: bool = option(False)
    """Leave out the base model's own pictures of the same prompts (`benchmark/`)."""

    @property
    def has_gallery(self) -> bool:
        """Whether there is anything to paint."""
        return self.validation_prompt is not None or bool(self.validation_prompt_library)
