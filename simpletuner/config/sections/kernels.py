"""By which kernels the denoiser is computed."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Kernels"]


class Kernels(Section):
    """By which kernels the denoiser is computed: the same numbers up to rounding, at another speed."""

    dynamo_backend: Literal["no", "eager", "aot_eager", "inductor", "cudagraphs"] = option("no")
    """Compile each block of the denoiser by `torch.compile` with this backend. `inductor` is the fast one: some minutes at the
    start, then faster steps; `eager` and `aot_eager` serve to find faults."""

    attention_mechanism: Literal["diffusers", "native-flash", "native-efficient", "native-math", "cudnn"] = option("diffusers")
    """Kernel that attention prefers: PyTorch's flash, memory-efficient, plain or cuDNN one. Calls that it cannot serve (flash
    knows no masks on CUDA) take one of the others; `native-math` is always alone. `diffusers` leaves the choice to PyTorch."""

    disable_tf32: bool = option(False)
    """Train with full float32 matrix products and convolutions on NVIDIA cards, instead of TF32, which is several times faster
    there and keeps ten bits of precision. Encoders never compute in TF32."""
