from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.sections import Optimizer
from simpletuner.training.optimizers import build_optimizer, optimizer_state, restore_optimizer


def trained(name: str, dtype: torch.dtype, steps: int) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    parameters = {
        "down.weight": nn.Parameter(torch.randn(3, 4).to(dtype)),
        "up.weight": nn.Parameter(torch.randn(4, 3).to(dtype)),
    }
    optimizer = build_optimizer(Optimizer(optimizer=name, learning_rate=0.1), parameters)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimiser_of_the_catalogue_goes_on_from_its_saved_state_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    whole, expected = trained(name, dtype, 2)
    tensors, scalars = optimizer_state(whole, expected)
    fresh, parameters = trained(name, dtype, 0)
    restore_optimizer(fresh, parameters, tensors, scalars)
    for key, parameter in parameters.items():
        parameter.data.copy_(expected[key].data)
        parameter.grad = expected[key].grad
    whole.step()
    fresh.step()
    for key, parameter in parameters.items():
        assert torch.equal(parameter, expected[key])
        for state, value in whole.state[expected[key]].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[parameter][state]))
            assert not isinstance(value, torch.Tensor) or value.dtype == fresh.state[parameter][state].dtype


def test_a_saved_state_does_not_move_when_training_goes_on() -> None:
    optimizer, parameters = trained("adamw_bf16", torch.float32, 1)
    tensors, _ = optimizer_state(optimizer, parameters)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_the_users_settings_win_over_the_catalogues() -> None:
    options = Optimizer(
        optimizer="torch-adamw", learning_rate=0.25, optimizer_config={"betas": [0.5, 0.75], "weight_decay": 0.5}
    )
    group = build_optimizer(options, {"weight": nn.Parameter(torch.zeros(1))}).param_groups[0]
    assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (0.25, [0.5, 0.75], 0.5)
    assert group["eps"] == OPTIMIZERS["torch-adamw"].settings["eps"]
