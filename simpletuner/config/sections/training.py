"""How long and on how much at a time."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Training"]


class Training(Section):
    """How long the run trains, and on how much at a time."""

    max_train_steps: int = option(0, ge=0, level="essential")
    """Optimiser steps of the run; 0 leaves the length to `num_train_epochs`. With neither set: 2000 steps."""

    num_train_epochs: float = option(0, ge=0, level="essential")
    """Passes over the data; 0 leaves the length to `max_train_steps`. With both set the earlier end counts."""

    train_batch_size: int = option(1, ge=1, level="essential")
    """Samples in one forward pass on one device."""

    gradient_accumulation_steps: int = option(1, ge=1)
    """Forward passes whose gradients are averaged into one optimiser step."""

    seed: int = option(42, ge=0)
    """Root of every random draw: order of samples, noise, timesteps, dropout. The same seed repeats the run."""

    caption_dropout_probability: float = option(0.1, ge=0, le=1)
    """Share of samples trained with the empty caption, so that guidance has an unconditional answer to lean on."""

    i_know_what_i_am_doing: bool = option(False, level="experimental")
    """Turns those problems that can be overridden into warnings."""
