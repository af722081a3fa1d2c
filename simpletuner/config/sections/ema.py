"""A running average of the weights."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Ema"]


class Ema(Section):
    """The exponential moving average (EMA) of what is trained: smoother than the newest weights, and saved beside them."""

    use_ema: bool = option(False, level="essential")
    """Keep an average of the trained weights, in float32, and save it as `ema/` in checkpoints and beside the result."""

    ema_decay: float = option(0.995, ge=0, lt=1, when="use_ema=true")
    """Share of the old average that one optimiser step keeps; early steps keep less, so that the average soon leaves the start.
    0.995 looks back over some 200 steps, 0.9999 over 10,000."""

    ema_update_interval: int = option(1, ge=1, when="use_ema=true")
    """Update every so many optimiser steps, with the decay of as many steps at once."""

    ema_device: Literal["accelerator", "cpu"] = option("accelerator", when="use_ema=true")
    """Where the average lies: 4 bytes a trained weight. `cpu` spares the device and waits for a copy at each update."""

    ema_validation: Literal["none", "ema_only", "comparison"] = option("comparison", when="use_ema=true")
    """What the gallery shows: the trained weights (`none`), the average (`ema_only`), or both. The average's pictures are named
    `<nickname>_ema`."""
