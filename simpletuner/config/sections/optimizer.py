"""How weights move."""

from __future__ import annotations

from typing import Any, Literal

from simpletuner.config.options import Section, option

__all__ = ["Optimizer"]

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"]
FALLING = "linear|cosine|cosine_with_restarts|polynomial|sine"


class Optimizer(Section):
    """How weights move: update rule, step size and its schedule, clipping."""

    optimizer: str | None = option(None, level="essential")
    """Update rule. `adamw_bf16` keeps weights in bfloat16 with stochastic rounding; `torch-adamw` is PyTorch's fused AdamW.
    By package: `torch-*`, `optimi-*` (bfloat16 weights by Kahan summation), `bnb-*` (state in 8 bits, or paged to ordinary
    memory), `ao-*` (state in 8 or 4 bits), `prodigy`, `adamw_schedulefree`, `came`.
    Unset: `adamw_bf16` under `mixed_precision=bf16`, else `torch-adamw`."""

    optimizer_config: dict[str, Any] = option({})
    """Settings handed to the optimiser, as an object or "k=v,k=v": "betas=0.9,0.99,weight_decay=0". Each takes its own; a wrong
    one is answered with those that there are."""

    learning_rate: float | None = option(None, gt=0, level="essential")
    """Peak step size. Unset: 1e-4 for adapters, 1e-5 for full tuning; a fifth of that for Lion kinds; 1 for `prodigy`."""

    lr_scheduler: Schedule = option("constant_with_warmup")
    """Course of the step size, after its warmup, over the length of the run: from the peak to `lr_end` along a line (`linear`),
    half a cosine (`cosine`), several of them, each from the peak again (`cosine_with_restarts`), or a power (`polynomial`);
    `sine` swings from the peak to `lr_end` and back. `constant` has no warmup."""

    lr_warmup_steps: int | None = option(None, ge=0, when="lr_scheduler=constant_with_warmup|" + FALLING)
    """Optimiser steps over which the step size rises linearly from 0. Unset: 100, or 0 where another schedule is written."""

    lr_end: float = option(0.0, ge=0, when="lr_scheduler=" + FALLING)
    """Step size at the end of the schedule; of `sine` at its lowest."""

    lr_num_cycles: int = option(1, ge=1, when="lr_scheduler=cosine_with_restarts|sine")
    """Falls of `cosine_with_restarts`, or full swings of `sine`."""

    lr_power: float = option(1.0, gt=0, when="lr_scheduler=polynomial")
    """Power of `polynomial`: 1 is a line, more falls early, less falls late."""

    max_grad_norm: float = option(1.0, ge=0)
    """Clip the global gradient norm to this; 0 turns clipping off."""
