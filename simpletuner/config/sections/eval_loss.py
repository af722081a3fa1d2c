"""The loss on pictures that are never trained on."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["EvalLoss"]

ON = "eval_loss_disable=false"


class EvalLoss(Section):
    """The loss on sets of `dataset_type` `eval`: the same pictures, times and noise again and again, so that two figures differ
    by what was learned between them and by nothing else. It is told at the start, at the end, and at these intervals."""

    eval_steps_interval: int | None = option(None, ge=0, when=ON)
    """Every so many optimiser steps; 0 never for this reason. Unset: `checkpoint_step_interval`, or 0 where
    `eval_epoch_interval` is set."""

    eval_epoch_interval: float | None = option(None, ge=0, when=ON)
    """Every so many epochs, and decimals of them: 0.5 is twice an epoch; 0 never for this reason. Beside
    `eval_steps_interval`, both count."""

    eval_timesteps: int = option(28, ge=1, when=ON)
    """Times at which each picture is judged: a fixed grid, spread as densely as training draws them."""

    num_eval_images: int | None = option(None, ge=1, when=ON)
    """Pictures of each set that are judged, always the same: `max_num_samples` of every eval set. Unset: all. Each passes the
    denoiser once for every time."""

    eval_dataset_pooling: bool = option(False, when=ON)
    """Tell one figure for all sets, the mean over their pictures. Off: the figure of each set beside it, where there are
    several."""

    eval_loss_disable: bool = option(False)
    """Leave the eval sets alone: they are neither opened nor encoded nor judged."""
