"""How weights move."""

from __future__ import annotations

from typing import Any, Literal

from simpletuner.config.options import Section, option

__all__ = ["Optimizer"]


class Optimizer(Section):
    """How weights move: update rule, step size and its schedule, clipping."""

    optimizer: str | None = option(None, level="essential")
    """Update rule. `adamw_bf16` keeps weights in bfloat16 with stochastic rounding; `torch-adamw` is PyTorch's fused AdamW.
    Unset: `adamw_bf16` under `mixed_precision=bf16`, else `torch-adamw`."""

    optimizer_config: dict[str, Any] = option({})
    """Settings handed to the optimiser, as an object or "k=v,k=v": `betas`, `eps`, `weight_decay`."""

    learning_rate: float | None = option(None, gt=0, level="essential")
    """Peak step size. Unset: 1e-4 for adapters, 1e-5 for full tuning."""

    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine"] = option("constant_with_warmup")
    """Course of the step size. `cosine` falls over `max_train_steps` along half a cosine to `lr_end`."""

    lr_warmup_steps: int | None = option(None, ge=0, when="lr_scheduler=constant_with_warmup|cosine")
    """Optimiser steps over which the step size rises linearly from 0. Unset: 100, or 0 where another schedule is written."""

    lr_end: float = option(0.0, ge=0, when="lr_scheduler=cosine")
    """Step size at the end of the schedule."""

    max_grad_norm: float = option(1.0, ge=0)
    """Clip the global gradient norm to this; 0 turns clipping off."""
