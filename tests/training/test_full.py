from __future__ import annotations

from pathlib import Path

import torch
from training_fakes import Family, answer, make_run

from simpletuner.training.full import Full


def test_full_tuning_trains_every_weight_in_train_mode(tmp_path: Path) -> None:
    denoiser = Family().load_denoiser()
    tuning = Full(Family(), denoiser, make_run(tmp_path, model_type="full"))  # type: ignore[arg-type]
    answer(denoiser).sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())
    assert denoiser.to_out[1].training
    with tuning.evaluating():
        assert torch.equal(answer(denoiser), answer(denoiser))
    assert denoiser.to_out[1].training
