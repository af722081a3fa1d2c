"""Courses of the step size in closed form: the rate of any step follows from its number alone.

Steps are optimiser steps, whatever the number of processes or accumulation. Nothing is counted here, so nothing is resumed.
"""

from __future__ import annotations

import math

from simpletuner.config.sections import Optimizer

__all__ = ["learning_rate"]


def learning_rate(step: int, optimizer: Optimizer, steps: int) -> float:
    """The rate of the optimiser step after `step` done ones, in a run of `steps`.

    Warmup is linear: step 0 has a `warmup`-th of the peak (a rate of 0 would waste it), the last warmup step the peak.
    `cosine` then falls from the peak along half a cosine, which meets `lr_end` where the run ends.
    """
    peak, warmup = optimizer.learning_rate, optimizer.lr_warmup_steps
    assert peak is not None, "config/derive.py fills in learning_rate"
    assert warmup is not None, "config/derive.py fills in lr_warmup_steps"
    if optimizer.lr_scheduler == "constant":
        return peak
    if step < warmup:
        return peak * (step + 1) / warmup
    if optimizer.lr_scheduler == "constant_with_warmup":
        return peak
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return optimizer.lr_end + (peak - optimizer.lr_end) * (1 + math.cos(math.pi * progress)) / 2
