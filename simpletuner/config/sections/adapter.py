"""The adapter that is trained beside a frozen base."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Adapter"]


class Adapter(Section):
    """What is trained beside the frozen base (`model_type=lora`)."""

    lora_type: Literal["standard"] = option("standard", when="model_type=lora")
    """Kind of adapter. `standard` is plain LoRA, as every tool loads it."""

    lora_rank: int = option(16, ge=1, level="essential", when="model_type=lora")
    """Width of the low-rank matrices. 4-32 for a style or a subject, 64-128 for many concepts."""

    lora_alpha: float | None = option(None, gt=0, when="model_type=lora")
    """Strength of the adapter: its output is scaled by alpha / rank. Unset: equal to `lora_rank`."""

    lora_dropout: float = option(0.1, ge=0, lt=1, when="model_type=lora")
    """Share of the adapter's inputs dropped in training."""

    lora_init_type: Literal["default", "gaussian"] = option("default", when="model_type=lora")
    """How the down projection starts (`default`: Kaiming-uniform). The up projection starts at zero either way."""

    init_lora: str | None = option(None, path="input", when="model_type=lora")
    """A `pytorch_lora_weights.safetensors` file (or its folder) to start from; rank and targets must be the same."""
