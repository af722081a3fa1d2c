"""What is trained and how it lies on disk: a LoRA beside the frozen base, or every weight of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from simpletuner.config.run import Run
from simpletuner.families.base import ModelFamily, StateDict
from simpletuner.training.full import Full
from simpletuner.training.lora import Lora

__all__ = ["Tuning", "build_tuning"]


class Tuning(Protocol):
    """What is trainable. Names are those on disk, without the family's prefix."""

    keeps_base: bool
    """Whether the untouched base can be asked at any time (`disabled`)."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves."""
        ...

    def weights(self) -> StateDict:
        """Everything that a checkpoint holds, on the CPU."""
        ...

    def load(self, weights: Mapping[str, Tensor], source: str = "the file") -> None:
        """Take weights as `weights` gave them; `source` names them in messages. Raises UserError if they do not fit."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The base's own answer: what is trained and every dropout are off inside."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """The trained model's answer with every dropout off."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights as a checkpoint holds them."""
        ...

    def read(self, folder: Path) -> StateDict:
        """What `save` wrote."""
        ...

    def save_result(self, folder: Path) -> Path:
        """Write the weights as stock pipelines load them; returns the file or folder."""
        ...


def build_tuning(family: ModelFamily, denoiser: nn.Module, run: Run) -> Tuning:
    """Make `denoiser` trainable as the run asks."""
    return Lora(family, denoiser, run) if run.model.model_type == "lora" else Full(family, denoiser, run)
