"""The objective's options as `Trainer.loss` obeys them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_fakes import Family, Trainer, make_batch, make_run, trainer_of

from simpletuner.config.sections import Objective
from simpletuner.data.samples import draw_seed
from simpletuner.diffusion.objective import huber, huber_c, l2


class Watching(Family):
    """Keeps what the denoiser was handed and what it answered."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def predict(self, denoiser: Any, x_BCHW: Tensor, t_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
        answer_BCHW = super().predict(denoiser, x_BCHW, t_B, cond)
        self.calls.append((x_BCHW.detach(), t_B, answer_BCHW.detach()))
        return answer_BCHW


def watched(folder: Path, *, step: int = 0, regularisation: bool = False, **options: Any) -> tuple[Tensor, Watching]:
    """Losses of one batch, and what the denoiser was asked, after `step` optimiser steps."""
    family = Watching()
    with trainer_of(make_run(folder, **{"lora_dropout": 0.0, **options}), steps=100, family=family) as trainer:
        trainer.state.step = step
        loss_B = trainer.loss(make_batch(0, 0, is_regularisation=regularisation))
    return loss_B.detach(), family


def plain_noise() -> Tensor:
    """The noise that the trainer draws for the batch: after two offsets of time."""
    torch.manual_seed(draw_seed(7, 0, 0))
    torch.rand(2, dtype=torch.float64)
    return torch.randn(2, 4, 3, 3)


def test_the_loss_is_huber_at_each_samples_own_time(tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss_type": "huber", "huber_c": 0.3, "huber_schedule": "snr"}
    loss_B, family = watched(tmp_path, **options)
    [(_, t_B, answer_BCHW)] = family.calls
    target_BCHW = plain_noise() - make_batch(0, 0).latents_BCHW
    torch.testing.assert_close(loss_B, huber(answer_BCHW, target_BCHW, huber_c(Objective(**options), t_B, t_B)))
    d = (answer_BCHW - target_BCHW).double()
    c = (0.7 * (1 - t_B.double()) ** 2 + 0.3).view(2, 1, 1, 1)
    expected_B = (2 * c * (torch.sqrt(d**2 + c**2) - c)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss_B.double(), expected_B, atol=1e-6, rtol=1e-6)


def test_an_adapters_regularisation_is_judged_by_the_same_loss(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path, loss_type="smooth_l1", huber_c=1e-4, lora_dropout=0.0), steps=1) as trainer:
        trainer.tuning.parameters()["to_out.0.lora_B.weight"].data.fill_(0.1)
        judged_B = trainer.loss(make_batch(0, 0, is_regularisation=True))
        with torch.no_grad():
            ours, base = (answers(trainer, is_base=is_base) for is_base in (False, True))
    torch.testing.assert_close(judged_B, 2 * (ours - base).abs().flatten(1).mean(1), atol=2e-4, rtol=1e-3)


def answers(trainer: Trainer, *, is_base: bool) -> Tensor:
    """The denoiser's answer at the batch's own draws."""
    batch = make_batch(0, 0)
    torch.manual_seed(draw_seed(7, 0, 0))
    u_B = (torch.arange(2, dtype=torch.float64) + torch.rand(2, dtype=torch.float64)) / 2
    t_B = trainer.family.density((3, 3))(u_B).float()
    x_BCHW = trainer.family.process.diffuse(batch.latents_BCHW, torch.randn(2, 4, 3, 3), t_B)
    with trainer.tuning.disabled() if is_base else trainer.tuning.evaluating():
        return trainer.predict(x_BCHW, t_B, batch.cond)


@pytest.mark.parametrize("step", [0, 5, 9])
def test_perturbation_adds_a_fading_share_of_noise_to_the_input_and_none_to_the_target(tmp_path: Path, step: int) -> None:
    options = {"input_perturbation": 0.5, "input_perturbation_steps": 10}
    loss_B, family = watched(tmp_path, step=step, **options)
    [(x_BCHW, t_B, answer_BCHW)] = family.calls
    noise_BCHW = plain_noise()
    further_BCHW = torch.randn(2, 4, 3, 3)  # the next draw
    t_B111, x0_BCHW = t_B.view(2, 1, 1, 1), make_batch(0, 0).latents_BCHW
    share = 0.5 * (1 - step / 10)
    expected_BCHW = (1 - t_B111) * x0_BCHW + t_B111 * (noise_BCHW + share * further_BCHW)
    torch.testing.assert_close(x_BCHW, expected_BCHW, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss_B, l2(answer_BCHW, noise_BCHW - x0_BCHW))


def test_without_perturbation_or_after_it_has_faded_every_draw_is_as_without_the_option(tmp_path: Path) -> None:
    """A dropout draws after it, so that a further draw would show."""
    plain_B, plain = watched(tmp_path / "plain", model_type="full", step=10)
    for name, options in {"none": {"input_perturbation_steps": 10}, "faded": {"input_perturbation": 0.5}}.items():
        loss_B, family = watched(tmp_path / name, **{"input_perturbation_steps": 10, **options}, model_type="full", step=10)
        assert torch.equal(loss_B, plain_B)
        assert torch.equal(family.calls[0][2], plain.calls[0][2])


def test_perturbation_is_keyed_by_the_micro_batch(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path, input_perturbation=0.3), steps=1) as trainer:
        first = trainer.loss(make_batch(0, 1))
        torch.rand(17)
        assert torch.equal(trainer.loss(make_batch(0, 1)), first)


def test_the_bases_answer_is_taken_at_the_same_perturbed_input(tmp_path: Path) -> None:
    loss_B, family = watched(tmp_path, regularisation=True, input_perturbation=0.5)
    (base, _, _), (ours, _, _) = family.calls
    assert torch.equal(base, ours)
    assert not torch.equal(base, watched(tmp_path / "plain", regularisation=True)[1].calls[0][0])
    assert loss_B.tolist() == [0.0, 0.0], "a fresh adapter answers as the base does"


def test_a_resumed_run_goes_on_in_the_fading(tmp_path: Path) -> None:
    options: dict[str, Any] = {"input_perturbation": 0.5, "input_perturbation_steps": 6, "loss_type": "huber"}
    with trainer_of(make_run(tmp_path / "whole", **options), steps=8) as trainer:
        trainer.fit()
        expected = trainer.tuning.weights()
    broken = make_run(tmp_path / "broken", **options)
    with trainer_of(make_run(tmp_path / "broken", **options), steps=3) as trainer:
        trainer.fit()
    with trainer_of(broken, steps=8) as trainer:
        assert trainer.state.step == 3
        trainer.fit()
        for name, weight in trainer.tuning.weights().items():
            assert torch.equal(weight, expected[name])
