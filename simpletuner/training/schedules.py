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
    The step after it has the peak again; there the curve begins, and it would meet its end one step after the last.
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
    return optimizer.lr_end + (peak - optimizer.lr_end) * _height(progress, optimizer)


def _height(progress: float, optimizer: Optimizer) -> float:
    """How much of the way from the end to the peak is left after this share of the curve: 1 at its beginning."""
    cycles = optimizer.lr_num_cycles
    match optimizer.lr_scheduler:
        case "linear":
            return 1 - progress
        case "polynomial":
            return (1 - progress) ** optimizer.lr_power
        case "cosine":
            return _half_cosine(progress)
        case "cosine_with_restarts":
            return _half_cosine(progress * cycles % 1) if progress < 1 else 0.0
        case "sine":  # a sine that begins at its crest, so that nothing jumps after the warmup
            return (1 + math.sin(math.pi * (2 * cycles * progress + 0.5))) / 2
    raise AssertionError(f"no curve for {optimizer.lr_scheduler}")


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
