"""Number formats."""

from __future__ import annotations

from typing import Literal, get_args

from simpletuner.config.options import Section, option

__all__ = ["Precision"]

Stored = Literal[
    "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao", "nf4-bnb"
]
QUANTISED = "|".join(get_args(Stored)[1:])


class Precision(Section):
    """Number formats of weights and arithmetic."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(None, level="essential")
    """`bf16` holds the frozen weights in bfloat16 (half the memory, faster); `fp16` in float16, with a scaled loss, for cards
    without bf16; `no` keeps everything in float32. Unset: bf16 where the hardware has it, else `no`."""

    base_model_precision: Stored = option("no_change", level="essential")
    """Store the frozen base in fewer bits: `int8-*` and `fp8-*` in half the memory of bf16, `int4-quanto` and `nf4-bnb` in
    about a quarter, `int2-quanto` in less, at a price in quality. What is trained keeps its own format; `model_type=full`
    trains the base itself, and takes only `no_change`."""

    base_model_default_dtype: Literal["bf16", "fp16", "fp32"] | None = option(None, when=f"base_model_precision={QUANTISED}")
    """Format of those weights of a quantised base that stay whole (norms and the like), and of its arithmetic.
    Unset: that of `mixed_precision`; with `no`: bf16 where the hardware has it, else fp32."""

    text_encoder_1_precision: Stored = option("no_change")
    """Store the first text encoder in fewer bits while prompts are encoded. Embeds change a little, so they are cached anew."""

    quantize_via: Literal["accelerator", "cpu"] = option(
        "accelerator", when=f"base_model_precision={QUANTISED} or text_encoder_1_precision={QUANTISED}"
    )
    """Where weights are quantised. `cpu` never has an unquantised layer on the device, for cards of 16 GB and less."""
