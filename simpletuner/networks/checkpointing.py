"""Gradient checkpointing of every n-th block: memory and speed between all and none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(
    denoiser: Any,
    blocks: Sequence[nn.Module],
    interval: int,
    *,
    recomputing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Recompute the activations of blocks 0, n, 2n, ... in the backward pass instead of keeping them.

    `denoiser` is a diffusers model and `blocks` are those of its blocks that it offers for checkpointing, in their order.
    It does so in eval mode too (a frozen base under adapters), whenever gradients are on. Blocks are recomputed inside
    `recomputing`.
    """
    chosen = frozenset(blocks[::interval])

    def run(block: nn.Module, *inputs: Any) -> Any:
        # Not reentrant: the adapters' gradients flow though the inputs of a frozen base's first block ask for none.
        if block not in chosen:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing()))

    denoiser.enable_gradient_checkpointing(run)
