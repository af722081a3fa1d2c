"""LoRA: low-rank matrices beside the layers of a frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.config.run import Run
from simpletuner.data.samples import draw_seed
from simpletuner.errors import UserError
from simpletuner.families.base import ModelFamily, StateDict
from simpletuner.families.common import adapter_alpha, evaluating
from simpletuner.training.targets import lora_targets
from simpletuner.training.weights import MEND_MODEL, check_names, copy, on_cpu, shapes

__all__ = ["Lora"]

ADAPTER = "default"
"""PEFT's name of an adapter that was given none."""


class Lora:
    """Low-rank adapters by PEFT in a frozen base.

    The base stays in `eval`: its own dropout, if it has one, would part the regularisation target from what the base answers.
    """

    keeps_base = True
    notices = ()

    def __init__(self, family: ModelFamily, denoiser: nn.Module, run: Run) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # 2 s that nobody else should pay
        from peft.tuners.lora import LoraLayer

        adapter = run.adapter
        assert adapter.lora_alpha is not None, "config/derive.py fills in lora_alpha"
        self._family = family
        self._denoiser = denoiser
        self._rank = adapter.lora_rank
        self._config = LoraConfig(
            r=adapter.lora_rank,
            lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]  # a float is as good
            lora_dropout=adapter.lora_dropout,
            init_lora_weights=True if adapter.lora_init_type == "default" else adapter.lora_init_type,
            target_modules=lora_targets(adapter, family, denoiser),
            use_dora=adapter.use_dora,
        )
        denoiser.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):  # the weights are still on the CPU
            torch.manual_seed(draw_seed(run.training.seed, "adapter"))
            inject_adapter_in_model(self._config, denoiser)
        self._layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
        self._parameters = {
            _name_on_disk(name): parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad
        }
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(getattr(torch, run.dtypes.trained))
        for layer in self._layers:
            for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
                part.train()
        if adapter.init_lora:
            source = f"init_lora {adapter.init_lora}"
            self.load(family.load_adapter(Path(adapter.init_lora)), source)
            _check_alpha(adapter_alpha(Path(adapter.init_lora)), adapter.lora_alpha, source)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._parameters)

    def weights(self, instead: Mapping[str, Tensor] | None = None) -> StateDict:
        return {name: on_cpu(tensor) for name, tensor in (instead or self._parameters).items()}

    def load(self, weights: Mapping[str, Tensor], source: str = "the file") -> None:
        _check_dora(weights, self._config.use_dora, source)
        check_names(self._parameters, weights, source)
        for name, parameter in self._parameters.items():
            if weights[name].shape != parameter.shape:
                raise self._misfit(name, weights[name], source)
        copy(self._parameters, weights)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self._denoiser)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        for layer in self._layers:
            layer.set_scale(ADAPTER, strength)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.set_scale(ADAPTER, 1.0)

    def save(self, folder: Path, instead: Mapping[str, Tensor] | None = None) -> None:
        self._family.save_adapter(self.weights(instead), self.lora_config(), folder)

    def read(self, folder: Path) -> StateDict:
        return self._family.load_adapter(folder)

    def save_result(self, folder: Path) -> Path:
        return self._family.save_adapter(self.weights(), self.lora_config(), folder)

    def lora_config(self) -> dict[str, Any]:
        """PEFT's own description, JSON-able: stock loaders need it, or they take alpha to be the rank."""
        facts = self._config.to_dict()
        facts["lora_dropout"] = 0.0  # stock pipelines leave what they load in train mode (diffusers 0.42): it would act there
        facts["peft_type"] = self._config.peft_type.value  # type: ignore[union-attr]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in facts.items()}

    def _misfit(self, name: str, theirs: Tensor, source: str) -> UserError:
        rank = theirs.shape[0 if ".lora_A." in name else 1] if theirs.ndim > 1 else self._rank  # else DoRA's lengths of rows
        if rank == self._rank:
            return UserError(f"{source} does not fit this run: {shapes(name, theirs, self._parameters[name])}", mend=MEND_MODEL)
        return UserError(
            f"{source} has rank {rank}, but lora_rank is {self._rank}.",
            why="matrices of another size cannot be taken over.",
            mend=f'set "lora_rank" to {rank}, or train the new rank afresh in another output_dir.',
        )


def _name_on_disk(name: str) -> str:
    """PEFT's name of a parameter as stock loaders want it: without the adapter's, and DoRA's without `.weight`."""
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default.", ".")


def _check_dora(weights: Mapping[str, Tensor], use_dora: bool, source: str) -> None:
    is_dora = any(name.endswith(".lora_magnitude_vector") for name in weights)
    if is_dora != use_dora:
        theirs, ours = ("a DoRA", "false") if is_dora else ("a LoRA", "true")
        raise UserError(f"{source} is {theirs}, but use_dora is {ours}.", mend=f'set "use_dora" to {str(is_dora).lower()}.')


def _check_alpha(theirs: float | None, ours: float, source: str) -> None:
    if theirs is not None and theirs != ours:
        raise UserError(
            f"{source} was trained with lora_alpha {theirs:g}, but lora_alpha is {ours:g}.",
            why=f"its matrices would count {ours / theirs:.3g} times as much as they were trained to.",
            mend=f'set "lora_alpha" to {theirs:g}.',
        )
