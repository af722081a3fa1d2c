"""How a weight is written in few bits: the libraries choose scales and codes, what is kept of them are plain tensors.

Plain tensors move, are offloaded and pass DDP like any buffer. The libraries' own layers fail at one or another: torchao 0.18
keeps each decoded weight from forward to backward, optimum-quanto 0.2.7 keeps the inputs and cannot be offloaded by
`tensor.data = ...`, bitsandbytes 0.50 has its scales outside of parameters and buffers.
Shape letters:  R rows (outputs),  C columns (inputs),  G groups (runs of columns with a scale of their own).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from simpletuner.config.catalogue import PRECISIONS
from simpletuner.networks.libraries import require_quietly

__all__ = ["CODECS", "Codec", "Parts"]

Parts = Mapping[str, Tensor]
"""What is stored of a weight, by name."""

GROUPS = (128, 96, 64, 32)
"""Columns that share a scale in int4 and int2; optimum-quanto's own choice."""
NF4_BLOCK = 64
NF4_SCALE_BLOCK = 256


class Codec(Protocol):
    """One way to store a matrix."""

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this size can be stored well."""
        ...

    def encode(self, weight_RC: Tensor) -> Parts:
        """The parts of a matrix in float32, bfloat16 or float16; the same for the same values."""
        ...

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix again, as near as its bits allow."""
        ...


@dataclass(frozen=True)
class QuantoBytes:
    """A byte for each weight, a scale for each row (optimum-quanto)."""

    kind: str
    """Name of quanto's type."""

    def fits(self, rows: int, columns: int) -> bool:
        return rows > 1  # quanto refuses a scale for each row where there is one

    def encode(self, weight_RC: Tensor) -> Parts:
        quanto = _library("int8-quanto")
        kind = quanto.qtypes[self.kind]
        scale_R1 = _no_zeros(quanto.AbsmaxOptimizer()(weight_RC, qtype=kind, axis=0))
        codes_RC = torch.ops.quanto.quantize_symmetric(weight_RC, dtype=kind.dtype, axis=0, scale=scale_R1)
        return {"codes": codes_RC.view(torch.int8), "scale": scale_R1}

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes_RC = parts["codes"]
        if self.kind != "qint8":
            codes_RC = codes_RC.view(torch.float8_e4m3fn)
        return codes_RC.to(dtype) * parts["scale"]


@dataclass(frozen=True)
class QuantoBits:
    """Four or two bits for each weight, a scale and a shift for each group (optimum-quanto)."""

    bits: int

    def fits(self, rows: int, columns: int) -> bool:
        return rows > 1 and (columns <= GROUPS[0] or _group(columns) is not None)

    def encode(self, weight_RC: Tensor) -> Parts:
        quanto = _library("int4-quanto")
        kind = quanto.qtypes[f"qint{self.bits}"]
        group = _group(weight_RC.shape[1])
        scale_G1, shift_G1 = quanto.MaxOptimizer()(weight_RC, qtype=kind, axis=0, group_size=group)
        codes_GC = torch.ops.quanto.quantize_affine(
            weight_RC, bits=self.bits, axis=0, group_size=group, scale=_no_zeros(scale_G1), shift=shift_G1
        )
        packed = quanto.tensor.packed.pack_weights(codes_GC, self.bits)
        return {"codes": packed, "scale": scale_G1, "shift": shift_G1}

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        packed, scale_G1 = parts["codes"], parts["scale"]
        shifts = range(0, 8, self.bits)  # one byte holds a weight of each eighth, quarter or half of the groups
        codes_GC = torch.cat([(packed >> shift) & (2**self.bits - 1) for shift in shifts])[: len(scale_G1)]
        return (codes_GC.to(dtype) * scale_G1).sub_(parts["shift"]).reshape(shape)


@dataclass(frozen=True)
class TorchaoBytes:
    """A byte for each weight, a float32 scale for each row (torchao)."""

    is_float: bool

    def fits(self, rows: int, columns: int) -> bool:
        return True

    def encode(self, weight_RC: Tensor) -> Parts:
        torchao = _library("fp8-torchao" if self.is_float else "int8-torchao").quantization
        kind = torchao.Float8Tensor if self.is_float else torchao.Int8Tensor
        stored = kind.from_hp(weight_RC, granularity=torchao.PerRow())
        # Of a row of zeros Float8Tensor makes 0 / 0, which is stored as no number (torchao 0.18).
        codes_RC = stored.qdata.view(torch.int8).masked_fill(~weight_RC.any(1, keepdim=True), 0)
        return {"codes": codes_RC, "scale": stored.scale}

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes_RC = parts["codes"]
        if self.is_float:
            codes_RC = codes_RC.view(torch.float8_e4m3fn)
        return (codes_RC.to(torch.float32) * parts["scale"]).to(dtype)


@dataclass(frozen=True)
class BitsandbytesNF4:
    """Four bits for each weight, on the quantiles of a normal distribution; scales of blocks are quantised too (QLoRA)."""

    def fits(self, rows: int, columns: int) -> bool:
        return rows * columns % NF4_BLOCK == 0

    def encode(self, weight_RC: Tensor) -> Parts:
        functional = _library("nf4-bnb").functional
        codes, state = functional.quantize_4bit(
            weight_RC.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
        )
        scales = state.state2
        return {
            "codes": codes,
            "scale": state.absmax,
            "offset": state.offset,
            "scale_of_scales": scales.absmax,
            "scale_table": scales.code,
        }

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        scale = torch.ops.bitsandbytes.dequantize_blockwise(
            parts["scale"], parts["scale_of_scales"], parts["scale_table"], NF4_SCALE_BLOCK, torch.float32
        )
        scale += parts["offset"]
        # Blocks as rows: for rows of odd length the CPU's kernel falls back to one that torch.compile builds first (0.50.2).
        blocks = [len(scale), NF4_BLOCK]
        return torch.ops.bitsandbytes.dequantize_4bit(parts["codes"], scale, NF4_BLOCK, "nf4", blocks, dtype).reshape(shape)


CODECS: dict[str, Codec] = {
    "int8-quanto": QuantoBytes("qint8"),
    "int4-quanto": QuantoBits(4),
    "int2-quanto": QuantoBits(2),
    "fp8-quanto": QuantoBytes("qfloat8_e4m3fn"),
    "int8-torchao": TorchaoBytes(is_float=False),
    "fp8-torchao": TorchaoBytes(is_float=True),
    "nf4-bnb": BitsandbytesNF4(),
}


def _library(precision: str) -> Any:
    row = PRECISIONS[precision]
    return require_quietly(row.module, option=precision, extra=row.extra)


def _group(columns: int) -> int | None:
    """Columns in a group; None where a row has one scale, or where no size of group divides it."""
    return None if columns <= GROUPS[0] else next((size for size in GROUPS if columns % size == 0), None)


def _no_zeros(scale: Tensor) -> Tensor:
    """A row of zeros would be 0 / 0: in fp8 that is stored as no number, and the whole answer becomes none."""
    return torch.where(scale == 0, 1, scale)
