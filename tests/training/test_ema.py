from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_fakes import Told, make_run, trainer_of

from simpletuner.events import Notice
from simpletuner.networks.counting import PeakBytes
from simpletuner.training.ema import Ema, decay_at

ADAPTER = "pytorch_lora_weights.safetensors"
FULL = "transformer/diffusion_pytorch_model.safetensors"


def average(course: list[float], decay: float, interval: int) -> float:
    """By the definition, in Python's float64: the average begins at the first value, and follows at the interval."""
    shadow = course[0]
    for step, value in enumerate(course[1:], start=1):
        if step % interval == 0:
            keep = min((1 + step) / (10 + step), decay) ** interval
            shadow = keep * shadow + (1 - keep) * value
    return shadow


@pytest.mark.parametrize(("decay", "interval"), [(0.995, 1), (0.9, 1), (0.995, 4), (0.0, 1)])
def test_the_average_follows_its_definition_over_a_whole_run(decay: float, interval: int) -> None:
    course = torch.randn(301, generator=torch.Generator().manual_seed(0)).cumsum(0).tolist()
    weight = nn.Parameter(torch.tensor([course[0]]))
    ema = Ema({"w": weight}, decay=decay, interval=interval, device="cpu")
    for step, value in enumerate(course[1:], start=1):
        weight.data.fill_(value)
        ema.update(step)
    with ema.applied():
        assert weight.item() == pytest.approx(average(course, decay, interval), rel=1e-4, abs=1e-4)
    assert weight.item() == pytest.approx(course[-1])


def test_early_steps_keep_less_of_the_old() -> None:
    assert decay_at(0, 0.995, 1) == 0.1
    assert decay_at(10, 0.995, 1) == 11 / 20
    assert decay_at(10_000, 0.995, 1) == 0.995
    assert decay_at(10_000, 0.995, 8) == pytest.approx(0.995**8)


def test_the_average_of_bfloat16_weights_moves_by_less_than_bfloat16_can_say() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = Ema({"w": weight}, decay=0.995, interval=1, device="cpu")
    weight.data += 0.0078125  # one step of bfloat16 at 1: a shadow in that format would never leave 1
    for step in range(2000, 2400):
        ema.update(step)
    expected = 1 + 0.0078125 * (1 - 0.995**400)
    torch.testing.assert_close(ema.weights()["w"], torch.full((4,), expected))
    with ema.applied():
        assert weight.dtype == torch.bfloat16


def test_the_weights_are_what_they_were_after_the_average_stood_in_for_them() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema({"w": weight}, decay=0.5, interval=1, device="cpu")
    place, weight.data[0] = weight.data_ptr(), 1e-8
    with ema.applied():
        assert weight[0] == 1
    assert (weight[0].item(), weight.data_ptr()) == (pytest.approx(1e-8), place)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_saving_and_showing_the_average_leaves_gradients_where_ddp_waits_for_them(tmp_path: Path, kind: str) -> None:
    """In another format for a moment, a parameter gets a new place for its gradient, and DDP on the old one hangs."""
    options = {"optimizer": "adamw_bf16", "trained": "bfloat16", "mixed_precision": "bf16", "model_type": kind}
    with trainer_of(make_run(tmp_path, use_ema=True, checkpoint_step_interval=1, **options), steps=2) as trainer:
        parameters = trainer.tuning.parameters()
        places = [weight.expand_as(weight).grad_fn.next_functions[0][0] for weight in parameters.values()]
        arrived: list[int] = []
        for place in places:
            place.register_prehook(lambda *_: arrived.append(trainer.state.step))
        trainer.fit()
        assert trainer.ema is not None
        with trainer.ema.applied():
            pass
        sum(weight.sum() for weight in parameters.values()).backward()
    assert arrived == [step for step in range(3) for _ in places]


def test_following_holds_a_float32_copy_of_a_few_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.training.ema.CHUNK_ELEMENTS", 1000)
    weights = {str(n): nn.Parameter(torch.full((400,), float(n), dtype=torch.bfloat16)) for n in range(10)}
    ema = Ema(weights, decay=0.0, interval=1, device="cpu")
    for weight in weights.values():
        weight.data += 1
    with PeakBytes() as peak:
        ema.update(1)
    assert peak.peak <= 1000 * 4
    assert all((average == int(name) + 1).all() for name, average in ema.weights().items())
    with PeakBytes() as peak:
        ema.restart()
    assert peak.peak <= 400 * 4


KINDS: list[dict[str, Any]] = [
    {"model_type": "lora", "lora_dropout": 0.1},
    {"model_type": "lora", "optimizer": "adamw_bf16", "trained": "bfloat16", "mixed_precision": "bf16"},
    {"model_type": "full"},
    {"model_type": "full", "optimizer": "adamw_bf16", "trained": "bfloat16", "mixed_precision": "bf16"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['model_type']}-{kind.get('optimizer', 'torch-adamw')}")
def test_the_average_goes_on_after_a_resume_as_if_unbroken(tmp_path: Path, kind: dict[str, Any]) -> None:
    options = {"use_ema": True, "ema_update_interval": 2, "ema_decay": 0.9, "checkpoint_step_interval": 3} | kind
    averages = []
    for folder, stops in (("whole", [7]), ("broken", [3, 7])):
        for steps in stops:
            with trainer_of(make_run(tmp_path / folder, **options), steps=steps) as trainer:
                trainer.fit()
        file = tmp_path / folder / "checkpoint-7" / "ema" / (ADAPTER if kind["model_type"] == "lora" else FULL)
        averages.append(load_file(file))
    whole, broken = averages
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    newest = load_file(
        tmp_path / "whole" / "checkpoint-7" / file.name if kind["model_type"] == "lora" else file.parents[2] / FULL
    )
    assert newest.keys() == whole.keys()
    assert any(not torch.allclose(newest[name].float(), whole[name], atol=1e-4) for name in whole)


def test_the_average_is_saved_beside_the_result(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path, use_ema=True), steps=3) as trainer:
        trainer.fit()
        assert trainer.ema is not None
        with trainer.ema.applied():
            expected = trainer.tuning.weights()
    saved = load_file(tmp_path / "ema" / ADAPTER)
    assert all(torch.equal(saved[f"transformer.{name}"], expected[name]) for name in expected)


def test_an_average_turned_on_later_begins_at_that_step(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path), steps=3) as trainer:
        trainer.fit()
    told = Told()
    with trainer_of(make_run(tmp_path, use_ema=True), steps=6, told=told) as trainer:
        now = trainer.tuning.weights()
        assert trainer.ema is not None
        with trainer.ema.applied():
            assert all(torch.equal(now[name], weight) for name, weight in trainer.tuning.weights().items())
    assert any("the average begins at step 3" in notice.text for notice in told.of(Notice))


def test_training_is_the_same_with_and_without_an_average(tmp_path: Path) -> None:
    weights = []
    for folder, use_ema in (("with", True), ("without", False)):
        with trainer_of(make_run(tmp_path / folder, use_ema=use_ema, lora_dropout=0.1), steps=4) as trainer:
            trainer.fit()
            weights.append(trainer.tuning.weights())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
