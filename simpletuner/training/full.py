"""Full tuning: every weight of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.config.run import Run
from simpletuner.errors import UserError
from simpletuner.families.base import ModelFamily, StateDict
from simpletuner.families.common import evaluating
from simpletuner.training.weights import MEND_MODEL, check_names, copy, on_cpu, shapes

__all__ = ["Full"]


class Full:
    """Every weight of the denoiser, in train mode: a network's own dropout is active, as its authors trained it."""

    keeps_base = False
    notices = ()

    def __init__(self, family: ModelFamily, denoiser: nn.Module, run: Run) -> None:
        self._family = family
        self._denoiser = denoiser
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.to(getattr(torch, run.dtypes.trained))
        denoiser.requires_grad_(True).train()
        self._parameters = dict(denoiser.named_parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._parameters)

    def weights(self, instead: Mapping[str, Tensor] | None = None) -> StateDict:
        return {name: on_cpu(tensor) for name, tensor in {**self._denoiser.state_dict(), **(instead or {})}.items()}

    def load(self, weights: Mapping[str, Tensor], source: str = "the file") -> None:
        own = self._denoiser.state_dict()
        check_names(own, weights, source)
        for name, tensor in own.items():
            if weights[name].shape != tensor.shape:
                raise UserError(f"{source} does not fit this run: {shapes(name, weights[name], tensor)}", mend=MEND_MODEL)
        copy(own, weights)

    def disabled(self) -> AbstractContextManager[None]:
        """The base before the first step; afterwards nothing keeps it."""
        return self.evaluating()

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self._denoiser)

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        assert strength == 1, "evaluation/prompts.py refuses another: there is no adapter"
        return nullcontext()

    def save(self, folder: Path, instead: Mapping[str, Tensor] | None = None) -> None:
        self._family.save_denoiser(self.weights(instead), folder)

    def read(self, folder: Path) -> StateDict:
        return self._family.load_denoiser_weights(folder)

    def save_result(self, folder: Path) -> Path:
        self._family.save_pipeline(self.weights(), folder / "pipeline")
        return folder / "pipeline"
