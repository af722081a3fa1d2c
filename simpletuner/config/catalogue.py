"""Data only: the names of optimisers and what must be known of each. A new optimiser is one row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OPTIMIZERS", "OptimizerRow"]


@dataclass(frozen=True)
class OptimizerRow:
    """One update rule."""

    target: str
    """"module:attribute" of its class."""
    trained_dtype: str = "float32"
    """Format of the trained weights under `mixed_precision=bf16`; float32 without it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments, beneath the user's `optimizer_config`."""
    accepts: tuple[str, ...] = ("betas", "eps", "weight_decay")
    """Keys that `optimizer_config` may name."""
    extra: str = ""
    """Extra that brings the package, if it is not in the core."""


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw_bf16": OptimizerRow(
        "simpletuner.training.adamw_bf16:AdamWBF16",
        trained_dtype="bfloat16",
        settings={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    ),
    "torch-adamw": OptimizerRow(
        "torch.optim:AdamW",
        settings={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "fused": True},
    ),
}
