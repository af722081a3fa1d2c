"""Update rules by the names of the catalogue, and their state by the names of the parameters."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.sections import Optimizer
from simpletuner.errors import require

__all__ = ["build_optimizer", "optimizer_state", "restore_optimizer"]


def build_optimizer(options: Optimizer, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The update rule that `options` ask for, over all `parameters`."""
    assert options.optimizer is not None, "config/derive.py fills in optimizer"
    row = OPTIMIZERS[options.optimizer]
    module, attribute = row.target.split(":")
    home = (
        require(module, option=f"optimizer={options.optimizer}", extra=row.extra)
        if row.extra
        else importlib.import_module(module)
    )
    settings = {**row.settings, **options.optimizer_config}
    return getattr(home, attribute)(list(parameters.values()), lr=options.learning_rate, **settings)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Moments and the like as CPU tensors named `<parameter>/<key>`, and what is no tensor by parameter and key."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
) -> None:
    """Put back what `optimizer_state` gave, bit for bit.

    Not by `load_state_dict`: torch casts moments to the parameter's format there.
    """
    for name, facts in scalars.items():
        optimizer.state[parameters[name]].update(facts)
    for place, tensor in tensors.items():
        name, key = place.rsplit("/", 1)
        optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)
