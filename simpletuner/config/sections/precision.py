"""Number formats."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Precision"]


class Precision(Section):
    """Number formats of weights and arithmetic."""

    mixed_precision: Literal["no", "bf16"] | None = option(None, level="essential")
    """`bf16` holds the frozen weights in bfloat16 (half the memory, faster); `no` keeps everything in float32.
    Unset: bf16 where the hardware has it, else `no`."""
