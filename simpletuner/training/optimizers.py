"""Update rules by the names of the catalogue, and their state by the names of the parameters."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.config.catalogue import OPTIMIZERS, OptimizerRow
from simpletuner.config.sections import Optimizer
from simpletuner.errors import require
from simpletuner.training.weights import on_cpu

__all__ = ["averaged", "build_optimizer", "optimizer_state", "restore_optimizer", "set_rate"]

WHOLE = ""
"""Stands in the place of a parameter's name for what the update rule knows of all of them."""
EXACT = "trained"
"""Key of the weights being trained, where those shown and saved are their average."""

State = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]


@runtime_checkable
class Averaging(Protocol):
    """Schedule-free update rules: the weights trained are not those to use, and there is a switch between them."""

    def train(self) -> None:
        """To the weights that are trained."""

    def eval(self) -> None:
        """To their average."""


def build_optimizer(options: Optimizer, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The update rule that `options` ask for, over all `parameters`, which lie on their device already."""
    name, row = options.optimizer, _row(options)
    if row.unpaged and not any(parameter.is_cuda for parameter in parameters.values()):
        row = OPTIMIZERS[row.unpaged]
    module, attribute = row.target.split(":")
    home = require(module, option=f"optimizer={name}", extra=row.extra) if row.extra else importlib.import_module(module)
    settings = {**row.settings, **options.optimizer_config}
    with contextlib.redirect_stdout(io.StringIO()):  # prodigyopt 1.1.2 prints that its weight decay is decoupled
        optimizer = getattr(home, attribute)(list(parameters.values()), lr=options.learning_rate, **settings)
    if isinstance(optimizer, Averaging):
        optimizer.train()
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The step size of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's compiled step would be compiled anew for each number
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def averaged(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The weights to show and to save: those of a schedule-free rule are an average. Training then goes on as if not asked."""
    if not isinstance(optimizer, Averaging):
        yield
        return
    exact = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        _copy(parameters, exact)  # the way back by arithmetic would be off by a rounding


def optimizer_state(options: Optimizer, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> State:
    """Moments and the like as CPU tensors named `<parameter>/<key>`, and what is no tensor by parameter and key.

    A quantised moment is its parts: `<parameter>/<key>/<part>`. What belongs to all parameters stands under the empty name.
    """
    row = _row(options)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    group = {key: value for key, value in optimizer.param_groups[0].items() if key in row.carried}
    states = {name: optimizer.state[parameter] for name, parameter in parameters.items() if parameter in optimizer.state}
    for name, state in {WHOLE: group, **states}.items():
        for key, value in state.items():
            if key in row.remade or value is None:
                continue
            if isinstance(value, Tensor):
                tensors.update({place: on_cpu(part) for place, part in _parts(f"{name}/{key}", value, row).items()})
            else:
                scalars.setdefault(name, {})[key] = value
    if isinstance(optimizer, Averaging):
        tensors.update({f"{name}/{EXACT}": on_cpu(parameter) for name, parameter in parameters.items()})
    return tensors, scalars


def restore_optimizer(
    options: Optimizer,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
) -> None:
    """Put back what `optimizer_state` gave, bit for bit, into a fresh optimiser whose weights are restored already.

    Not by `load_state_dict`: torch casts moments to the parameter's format there.
    """
    row = _row(options)
    named = {place.split("/")[0] for place in tensors if not place.endswith(f"/{EXACT}")}
    saved = (scalars.keys() | named) - {WHOLE}
    _make_buffers(optimizer, [parameters[name] for name in parameters if name in saved])
    states = {WHOLE: optimizer.param_groups[0], **{name: optimizer.state[parameters[name]] for name in saved}}
    own = {
        place: part
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
        for place, part in _parts(f"{name}/{key}", value, row).items()
    }
    for place, tensor in tensors.items():
        name, key, *_ = place.split("/")
        if key == EXACT:
            _copy({name: parameters[name]}, {name: tensor})
        elif place in own and own[place].shape == tensor.shape and own[place].dtype == tensor.dtype:
            own[place].copy_(tensor)  # in place: it may be a paged buffer, or a part of a quantised one
        else:
            states[name][key] = tensor.to(parameters[name].device)
    for name, facts in scalars.items():
        states[name].update(facts)


@torch.no_grad()
def _make_buffers(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Let the update rule lay out its state where and how it wants it, by a step of zero gradient for each parameter.

    Such a step may move a weight (decay) and does count; weights are put back, counters are part of what is restored.
    """
    for parameter in parameters:
        weight = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
        parameter.copy_(weight)


def _parts(place: str, tensor: Tensor, row: OptimizerRow) -> dict[str, Tensor]:
    """The plain tensors that a tensor is made of: itself, or what a quantised one wraps."""
    if not is_traceable_wrapper_subclass(tensor):
        return {place: tensor}
    names, _ = tensor.__tensor_flatten__()
    return {f"{place}/{name}": getattr(tensor, name) for name in names if name not in row.remade}


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _row(options: Optimizer) -> OptimizerRow:
    assert options.optimizer is not None, "config/derive.py fills in optimizer"
    return OPTIMIZERS[options.optimizer]
