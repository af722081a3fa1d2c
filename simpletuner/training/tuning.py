"""What is trained and how it lies on disk: an adapter beside the frozen base (LoRA, LyCORIS), or the whole denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from simpletuner.config.run import Run
from simpletuner.events import Notice, Tell
from simpletuner.families.base import ModelFamily, StateDict
from simpletuner.networks.quantise import quantise
from simpletuner.training.full import Full
from simpletuner.training.lora import Lora
from simpletuner.training.lycoris import Lycoris

__all__ = ["Tuning", "build_tuning", "load_tuned"]


class Tuning(Protocol):
    """What is trainable. Names are those on disk, without the family's prefix."""

    keeps_base: bool
    """Whether the untouched base can be asked at any time (`disabled`)."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should be told of how it was built."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves."""
        ...

    def weights(self, instead: Mapping[str, Tensor] | None = None) -> StateDict:
        """Everything that a checkpoint holds, on the CPU; `instead` stands in the place of what is trained, in any format."""
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

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """Inside, the adapter counts `strength` times as much, as stock pipelines weigh it; full tuning knows only 1."""
        ...

    def save(self, folder: Path, instead: Mapping[str, Tensor] | None = None) -> None:
        """Write `weights(instead)` as a checkpoint holds them."""
        ...

    def read(self, folder: Path) -> StateDict:
        """What `save` wrote."""
        ...

    def save_result(self, folder: Path) -> Path:
        """Write the weights as stock pipelines load them; returns the file or folder."""
        ...


def load_tuned(family: ModelFamily, run: Run, *, device: str, tell: Tell) -> tuple[nn.Module, Tuning]:
    """The denoiser, its frozen weights stored as `base_model_precision` says, and what is trained of it.

    Raises UserError if the denoiser has no layer for that format, or none for the adapter.
    """
    denoiser = family.load_denoiser()
    precision = run.precision
    if precision.base_model_precision != "no_change":
        place = device if precision.quantize_via == "accelerator" else "cpu"
        outcome = quantise(denoiser, precision.base_model_precision, keep=family.kept_whole, device=place)
        tell(Notice(f"base_model_precision {precision.base_model_precision}: {outcome.summary}."))
    tuning = build_tuning(family, denoiser, run)
    for line in tuning.notices:
        tell(Notice(line))
    return denoiser, tuning


def build_tuning(family: ModelFamily, denoiser: nn.Module, run: Run) -> Tuning:
    """Make `denoiser` trainable as the run asks."""
    if run.model.model_type == "full":
        return Full(family, denoiser, run)
    return Lycoris(family, denoiser, run) if run.adapter.lora_type == "lycoris" else Lora(family, denoiser, run)
