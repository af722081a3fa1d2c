"""The frozen weights of a denoiser's blocks in CPU memory: they visit the device a group at a time.

Moving and hooking are diffusers'; when to move is ours. Diffusers' own hook takes a group off after its last block's forward,
but a recomputation goes through the blocks backwards and may end a block early: so here a group stays until another is needed.
And diffusers moves whole modules, with the adapters in them and their gradients; here frozen weights only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

__all__ = ["move_others", "offload_blocks"]

NAME = "simpletuner_offload"


class Visitors:
    """Which group is on the device: one at a time."""

    def __init__(self) -> None:
        self._present: ModuleGroup | None = None

    def receive(self, group: ModuleGroup) -> None:
        """Bring the group, after the one that is there has gone."""
        if self._present is group:
            return
        if self._present is not None:
            self._present.offload_()
        group.onload_()
        self._present = group


class VisitHook(ModelHook):
    """Brings its group before the module computes."""

    def __init__(self, group: ModuleGroup, visitors: Visitors) -> None:
        super().__init__()
        self._group = group
        self._visitors = visitors

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._visitors.receive(self._group)
        return args, kwargs


def offload_blocks(
    blocks: Sequence[nn.Module],
    device: str,
    *,
    blocks_per_group: int,
    is_pinned: bool,
) -> list[Tensor]:
    """Hook the blocks, adapters and all, so that their frozen weights come to `device` when needed; returns those weights.

    The weights are on the CPU. A backward pass finds them only if every block is recomputed: autograd keeps the parameter
    itself, and by then its weights have moved away. A recomputed block is there until its own backward pass has ended; single
    layers could not go before (torch's checkpointing keeps frozen weights as they are, 2.13), so there is no finer grain.
    `is_pinned` (CUDA only): from pinned memory, and nothing is copied back.
    """
    units = [blocks[first : first + blocks_per_group] for first in range(0, len(blocks), blocks_per_group)]
    stream = torch.cuda.current_stream(device) if is_pinned else None
    visitors = Visitors()
    offloaded: list[Tensor] = []
    for unit in units:
        weights = [weight for module in unit for weight in module.parameters() if not weight.requires_grad]
        buffers = [buffer for module in unit for buffer in module.buffers()]  # of a base in few bits, nearly all of it
        if not weights and not buffers:
            continue
        group = ModuleGroup(
            modules=[],
            parameters=weights,
            buffers=buffers,
            onload_device=torch.device(device),
            offload_device=torch.device("cpu"),
            onload_leader=unit[0],
            offload_leader=unit[-1],
            stream=stream,
        )
        if stream is not None:
            group.offload_()  # takes the pinned copies in place of the others
        for module in unit:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(VisitHook(group, visitors), NAME)
        offloaded += [*weights, *buffers]
    return offloaded


def move_others(module: nn.Module, offloaded: Sequence[Tensor], device: str) -> None:
    """Move every weight and buffer to `device` but the offloaded ones."""
    away = {id(weight) for weight in offloaded}
    module._apply(lambda tensor: tensor if id(tensor) in away else tensor.to(device))  # what `Module.to` is made of
