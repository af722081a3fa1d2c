from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_fakes import Family, make_run, stir

from simpletuner.training.full import Full
from simpletuner.training.lora import Lora
from simpletuner.training.lycoris import Lycoris
from simpletuner.training.tuning import Tuning, build_tuning

KINDS: dict[str, tuple[dict[str, Any], type[Tuning]]] = {
    "lora": ({}, Lora),
    "dora": ({"use_dora": True}, Lora),
    "lycoris": ({"lora_type": "lycoris"}, Lycoris),
    "full": ({"model_type": "full"}, Full),
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_come_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    options, expected = KINDS[kind]
    run = make_run(tmp_path, trained="bfloat16", **options)
    tuning, other = (build_tuning(Family(), Family().load_denoiser(torch.bfloat16), run) for _ in range(2))  # type: ignore[arg-type]
    assert isinstance(tuning, expected)
    stir(tuning)
    tuning.save(tmp_path / "here")
    other.load(other.read(tmp_path / "here"))
    weights = tuning.weights()
    assert weights.keys() == other.weights().keys()
    assert {parameter.dtype for parameter in tuning.parameters().values()} == {torch.bfloat16}
    for name, tensor in other.weights().items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])
