from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.sections import Optimizer
from simpletuner.training.optimizers import averaged, build_optimizer, optimizer_state, restore_optimizer, set_rate

CASES = [(name, "float32") for name in OPTIMIZERS]
CASES += [(name, "bfloat16") for name, row in OPTIMIZERS.items() if row.trained_dtype == "bfloat16"]
RATES = {"prodigy": 1.0, "torch-sgd": 0.05, "optimi-sgd": 0.05}


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """torchao compiles its step for each shape; its numbers are the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Trained:
    """A few parameters pulled towards a goal, by gradients that follow from the step alone."""

    def __init__(self, name: str, dtype: str, **config: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"down.weight": (16, 512), "up.weight": (512, 16), "bias": (5,), "idle": (3,)}
        self.parameters = {
            key: nn.Parameter(torch.randn(shape, generator=generator).to(getattr(torch, dtype)))
            for key, shape in shapes.items()
        }
        self.parameters["up.weight"].data.zero_()
        self.options = Optimizer(optimizer=name, learning_rate=RATES.get(name, 0.01), optimizer_config=config)
        self.optimizer = build_optimizer(self.options, self.parameters)
        self.steps = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            set_rate(self.optimizer, RATES.get(self.options.optimizer or "", 0.01) * (1 - self.steps / 40))
            for key, parameter in self.parameters.items():
                if key != "idle":
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = (parameter.detach().float() - 1 + noise).to(parameter.dtype)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1

    def save(self, folder: Path) -> None:
        tensors, scalars = optimizer_state(self.options, self.optimizer, self.parameters)
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "optimizer.json").write_text(json.dumps(scalars))
        with averaged(self.optimizer, self.parameters):
            save_file({key: one.detach().clone() for key, one in self.parameters.items()}, folder / "weights.safetensors")

    def restore(self, folder: Path, steps: int) -> None:
        with torch.no_grad():
            for key, weight in load_file(folder / "weights.safetensors").items():
                self.parameters[key].copy_(weight)
        tensors, scalars = load_file(folder / "optimizer.safetensors"), json.loads((folder / "optimizer.json").read_text())
        restore_optimizer(self.options, self.optimizer, self.parameters, tensors, scalars)
        self.steps = steps

    def equals(self, other: Trained) -> bool:
        return all(torch.equal(one, other.parameters[key]) for key, one in self.parameters.items())


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_saved_and_restored_optimiser_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: str) -> None:
    whole, broken, resumed = (Trained(name, dtype) for _ in range(3))
    whole.train(14)
    broken.train(7)
    assert not broken.equals(resumed)
    broken.save(tmp_path)
    resumed.restore(tmp_path, 7)
    assert resumed.equals(broken), "restoring moves no weight"
    resumed.train(7)
    assert resumed.equals(whole)
    broken.train(7)
    assert broken.equals(whole), "nor does saving"


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_changed_settings_take_effect_at_a_resume(tmp_path: Path, name: str, dtype: str) -> None:
    whole, broken = Trained(name, dtype), Trained(name, dtype)
    whole.train(5)
    whole.optimizer.param_groups[0]["weight_decay"] = 0.3
    whole.train(5)
    broken.train(5)
    broken.save(tmp_path)
    changed, kept = Trained(name, dtype, weight_decay=0.3), Trained(name, dtype)
    for resumed in (changed, kept):
        resumed.restore(tmp_path, 5)
        resumed.train(5)
    assert changed.equals(whole)
    assert not kept.equals(whole)


def test_a_setting_that_an_optimiser_keeps_in_its_state_changes_too(tmp_path: Path) -> None:
    broken, changed, kept = (Trained("optimi-stableadamw", "float32", eps=eps) for eps in (1e-6, 10.0, 1e-6))
    broken.train(5)
    broken.save(tmp_path)
    for resumed in (changed, kept):
        resumed.restore(tmp_path, 5)
        resumed.train(1)
    assert not changed.equals(kept)
    state = changed.optimizer.state[changed.parameters["bias"]]
    assert state["eps_sq"].item() == 100.0


def test_momentum_may_be_turned_off_at_a_resume(tmp_path: Path) -> None:
    for name in ("torch-sgd", "optimi-sgd"):
        broken, changed = Trained(name, "float32"), Trained(name, "float32", momentum=0.0)
        broken.train(5)
        broken.save(tmp_path)
        changed.restore(tmp_path, 5)
        before = changed.parameters["bias"].detach().clone()
        changed.train(1)
        noise = torch.Generator().manual_seed(5)
        for shape in ((16, 512), (512, 16)):
            torch.randn(shape, generator=noise)
        gradient = before - 1 + torch.randn(5, generator=noise)
        torch.testing.assert_close(changed.parameters["bias"].detach(), before - 0.05 * (1 - 5 / 40) * gradient)


def test_state_of_before_this_layout_is_still_read() -> None:
    """Earlier checkpoints: moments by parameter and key, and the steps of adamw_bf16 as plain numbers."""
    old, fresh = Trained("adamw_bf16", "bfloat16"), Trained("adamw_bf16", "bfloat16")
    old.train(3)
    tensors, scalars = {}, {}
    for key in ("down.weight", "up.weight", "bias"):
        state = old.optimizer.state[old.parameters[key]]
        tensors |= {f"{key}/{name}": state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
        scalars[key] = {"step": state["step"]}
        fresh.parameters[key].data.copy_(old.parameters[key].data)
    restore_optimizer(fresh.options, fresh.optimizer, fresh.parameters, tensors, scalars)
    fresh.steps = 3
    old.train(3)
    fresh.train(3)
    assert fresh.equals(old)


def test_quantised_moments_are_saved_in_their_few_bits() -> None:
    for name, factor in (("ao-adamw8bit", 2.2), ("ao-adamw4bit", 1.2), ("ao-adamwfp8", 2.2), ("bnb-adamw8bit", 2.2)):
        trained = Trained(name, "float32")
        trained.train(1)
        tensors, _ = optimizer_state(trained.options, trained.optimizer, trained.parameters)
        saved = sum(tensor.nbytes for place, tensor in tensors.items() if place.startswith("up.weight/"))
        assert saved < factor * 512 * 16, name


def test_a_saved_state_does_not_move_when_training_goes_on() -> None:
    trained = Trained("adamw_bf16", "float32")
    trained.train(1)
    tensors, _ = optimizer_state(trained.options, trained.optimizer, trained.parameters)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    trained.train(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_the_users_settings_win_over_the_catalogues() -> None:
    options = Optimizer(
        optimizer="torch-adamw", learning_rate=0.25, optimizer_config={"betas": [0.5, 0.75], "weight_decay": 0.5}
    )
    group = build_optimizer(options, {"weight": nn.Parameter(torch.zeros(1))}).param_groups[0]
    assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (0.25, [0.5, 0.75], 0.5)
    assert group["eps"] == OPTIMIZERS["torch-adamw"].settings["eps"]


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.unpaged])
def test_without_cuda_a_paged_optimiser_is_the_same_rule_in_ordinary_memory(name: str) -> None:
    """Large enough for a page, which on the CPU would crash AdEMAMix (bitsandbytes 0.50.2)."""
    weights = []
    for one in (name, OPTIMIZERS[name].unpaged):
        parameter = nn.Parameter(torch.linspace(-1, 1, 120_000).view(300, 400))
        optimizer = build_optimizer(Optimizer(optimizer=one, learning_rate=0.01), {"weight": parameter})
        for _ in range(2):
            parameter.grad = parameter.detach() ** 3
            optimizer.step()
        weights.append(parameter.detach())
    assert not torch.equal(weights[0], torch.linspace(-1, 1, 120_000).view(300, 400))
    assert torch.equal(*weights)


def test_nothing_is_printed_when_an_optimiser_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    for name in OPTIMIZERS:
        Trained(name, "float32")
    assert capsys.readouterr().out == ""


# averaged weights


def test_what_is_shown_of_a_schedule_free_run_is_the_average_of_its_iterates() -> None:
    """x_k = (1 - c_k) x_(k-1) + c_k z_k with y = (1 - beta) z + beta x (Defazio et al. 2024), in float64."""
    options = Optimizer(optimizer="adamw_schedulefree", learning_rate=0.1, optimizer_config={"weight_decay": 0})
    parameter = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = build_optimizer(options, {"weight": parameter})
    x = z = y = torch.tensor([3.0, -2.0], dtype=torch.float64)
    second = torch.zeros(2, dtype=torch.float64)
    for step in range(1, 9):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
        second = 0.999 * second + 0.001 * y**2
        z = z - 0.1 * y / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        x = (1 - 1 / step) * x + z / step
        y = 0.1 * z + 0.9 * x
    before = parameter.detach().clone()
    torch.testing.assert_close(before.double(), y, atol=1e-5, rtol=1e-5)
    with averaged(optimizer, {"weight": parameter}):
        torch.testing.assert_close(parameter.detach().double(), x, atol=1e-5, rtol=1e-5)
        assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)


def test_the_weights_in_training_come_back_even_if_showing_them_fails() -> None:
    trained = Trained("adamw_schedulefree", "float32")
    trained.train(5)
    before = {name: parameter.detach().clone() for name, parameter in trained.parameters.items()}
    with pytest.raises(RuntimeError), averaged(trained.optimizer, trained.parameters):
        raise RuntimeError
    assert all(torch.equal(trained.parameters[name], weight) for name, weight in before.items())
    trained.train(1)


def test_other_rules_show_what_they_train() -> None:
    trained = Trained("torch-adamw", "float32")
    trained.train(2)
    before = trained.parameters["bias"].detach().clone()
    with averaged(trained.optimizer, trained.parameters):
        assert torch.equal(trained.parameters["bias"], before)
