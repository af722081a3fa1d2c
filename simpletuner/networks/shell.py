"""A network in half precision that looks like a float32 one from outside, for stock pipelines that cast by the first weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Float32Shell"]


class Float32Shell(nn.Module):
    """Takes and gives float32; of what enters the network all but the arguments named `exact` is cast to `dtype`."""

    def __init__(self, network: Any, dtype: torch.dtype, *, exact: tuple[str, ...]) -> None:
        super().__init__()
        # First of its parameters, and so the one by which a pipeline judges it.
        self.format = nn.Parameter(torch.zeros((), device=next(network.parameters()).device), requires_grad=False)
        self.network = network
        self.config = network.config
        self._network_dtype = dtype
        self._exact = exact

    @property
    def dtype(self) -> torch.dtype:
        """The format that a pipeline casts to."""
        return self.format.dtype

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return self.format.device

    def forward(self, *, return_dict: bool, **inputs: Tensor) -> tuple[Tensor]:
        """The network's first answer, in float32."""
        cast = {name: tensor if name in self._exact else tensor.to(self._network_dtype) for name, tensor in inputs.items()}
        return (self.network(**cast, return_dict=return_dict)[0].float(),)
