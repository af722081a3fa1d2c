"""The exponential moving average of what is trained, in float32 whatever the weights are.

A shadow in bfloat16 would stand still: at decay 0.995 it moves only where a weight is off by 40 % or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Ema", "decay_at"]

CHUNK_ELEMENTS = 1 << 24
"""Parameters are followed together up to this many elements: few kernels, and never a float32 copy of a whole network."""


def decay_at(step: int, decay: float, interval: int) -> float:
    """Share of the old average that an update after `step` optimiser steps keeps, `interval` steps after the last one.

    min((1 + n) / (10 + n), decay) for one step: early averages forget their start quickly.
    """
    return min((1 + step) / (10 + step), decay) ** interval


class Ema:
    """The average of `parameters`. It begins as they are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float, interval: int, device: str) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self._interval = interval
        self._device = device
        self._shadows = {
            name: parameter.detach().to(device, torch.float32, copy=True) for name, parameter in parameters.items()
        }  # fmt: skip
        self._chunks = list(_chunks(self._parameters))

    def restart(self) -> None:
        """Begin anew with the parameters as they are."""
        self.load(self._parameters)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over an average; `weights` may hold more than the parameters."""
        for name, shadow in self._shadows.items():
            shadow.copy_(weights[name])  # in place: two averages at once may be more than the device holds

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the parameters, if `step`, the number of optimiser steps done, is at the interval."""
        if step % self._interval:
            return
        keep = decay_at(step, self._decay, self._interval)
        for names in self._chunks:
            torch._foreach_lerp_(
                [self._shadows[name] for name in names],
                [self._parameters[name].detach().to(self._device, torch.float32) for name in names],
                1 - keep,
            )

    def weights(self) -> dict[str, Tensor]:
        """The average itself, in float32, for saving: a resumed run goes on from these very numbers."""
        return dict(self._shadows)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average stands in for the parameters, in their format; afterwards they are what they were, to the bit."""
        former = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                # In the parameter's format, on its device: else autograd makes it a new place to gather its gradient, and
                # DDP, which waits at the old one, hangs in the next step.
                parameter.data = self._shadows[name].to(parameter)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = former[name]


def _chunks(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    chunk: list[str] = []
    elements = 0
    for name, parameter in parameters.items():
        if chunk and elements + parameter.numel() > CHUNK_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(name)
        elements += parameter.numel()
    if chunk:
        yield chunk
