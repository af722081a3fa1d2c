"""Compilation of a denoiser block by block: one compilation serves all of them, since they are alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["compile_blocks"]

RECOMPILE_LIMIT = 1024
"""Variants of a block before torch silently goes on uncompiled. Its own limit of 8 is soon met: sizes of pictures, training and
gallery, adapters on and off are variants, and so is the first block, whose input needs no gradient."""


def compile_blocks(blocks: Sequence[nn.Module], backend: str) -> None:
    """Compile each block in place: who calls it, gradient checkpointing too, calls the compiled one.

    Each size of pictures is compiled for itself. One code for all sizes would be sooner made, but inductor cannot yet order the
    symbolic strides of Sana's convolutions ("cannot determine truth value of Relational", torch 2.13).
    """
    for block in blocks:
        block.compile(backend=backend, dynamic=False, recompile_limit=RECOMPILE_LIMIT)
