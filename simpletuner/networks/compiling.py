"""Compilation of a denoiser block by block: one compilation serves all of them, since they are alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["compile_blocks"]

RECOMPILE_LIMIT = 64
"""Variants of a block before torch silently goes on uncompiled. Its own limit of 8 is soon met: training and gallery, adapters
on and off, and the first block, whose input needs no gradient, are variants, each once for the first size and once for all."""


def compile_blocks(blocks: Sequence[nn.Module], backend: str) -> None:
    """Compile each block in place: who calls it, gradient checkpointing too, calls the compiled one.

    The first size of pictures gets code of its own; from the second on one code serves all sizes.
    """
    for block in blocks:
        block.compile(backend=backend, recompile_limit=RECOMPILE_LIMIT)
