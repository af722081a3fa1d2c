"""The exponential moving average of what is trained, in float32 whatever the weights are.

A shadow in bfloat16 would stand still: at decay 0.995 it moves only where a weight is off by 40 % or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Ema", "decay_at"]


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
        self._shadows: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin anew with the parameters as they are."""
        self.load(self._parameters)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over an average; `weights` may hold more than the parameters."""
        self._shadows = {
            name: weights[name].detach().to(self._device, torch.float32, copy=True) for name in self._parameters
        }  # fmt: skip

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the parameters, if `step`, the number of optimiser steps done, is at the interval."""
        if step % self._interval:
            return
        current = [parameter.detach().to(self._device, torch.float32) for parameter in self._parameters.values()]
        keep = decay_at(step, self._decay, self._interval)
        torch._foreach_lerp_(list(self._shadows.values()), current, 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average stands in for the parameters, in their format; afterwards they are what they were, to the bit."""
        with self._standing_in(
            {name: shadow.to(self._parameters[name]) for name, shadow in self._shadows.items()},
        ):
            yield

    @contextmanager
    def exact(self) -> Iterator[None]:
        """The same in float32, for saving: a resumed run goes on from these very numbers."""
        with self._standing_in(self._shadows):
            yield

    @contextmanager
    def _standing_in(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        former = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = former[name]
