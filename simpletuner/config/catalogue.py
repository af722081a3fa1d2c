"""Data only: the names of optimisers and of formats of frozen weights, and what must be known of each. A row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OPTIMIZERS", "PRECISIONS", "OptimizerRow", "PrecisionRow"]


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


@dataclass(frozen=True)
class PrecisionRow:
    """One format of frozen weights. How it is written is in `networks/codecs.py`, under the same name."""

    module: str
    """The library that chooses scales and codes."""
    extra: str
    """Extra that brings it."""
    bits: float
    """Bits per weight with the scales, in large layers of a bfloat16 base."""
    not_on: Mapping[str, str] = field(default_factory=dict)
    """Device where it does not work -> why."""
    instead: tuple[str, ...] = ()
    """What works there."""


NO_FP8 = {"mps": "Apple's GPUs have no 8-bit floating point."}
NO_BNB = {"mps": "bitsandbytes has no kernel for it there that we could rely on."}

PRECISIONS: dict[str, PrecisionRow] = {
    "int8-quanto": PrecisionRow("optimum.quanto", "quanto", 8.01),
    "int4-quanto": PrecisionRow("optimum.quanto", "quanto", 4.25),
    "int2-quanto": PrecisionRow("optimum.quanto", "quanto", 2.25),
    "fp8-quanto": PrecisionRow("optimum.quanto", "quanto", 8.01, NO_FP8, ("int8-quanto", "int4-quanto")),
    "int8-torchao": PrecisionRow("torchao", "torchao", 8.02),
    "fp8-torchao": PrecisionRow("torchao", "torchao", 8.02, NO_FP8, ("int8-quanto", "int4-quanto")),
    "nf4-bnb": PrecisionRow("bitsandbytes", "bnb", 4.13, NO_BNB, ("int4-quanto",)),
}
