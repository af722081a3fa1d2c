"""The recipes that come as templates, run as they are but for the model, the pictures' sizes and the length."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from safetensors.torch import load_file

from simpletuner.config.sources import read_json
from tests.e2e.conftest import Workspace

TEMPLATES = Path(__file__).parents[2] / "config"


def run_recipe(workspace: Workspace, name: str, *words: str) -> tuple[Path, str]:
    """The run's folder, and what was said."""
    config = read_json(TEMPLATES / f"{name}.json.example", TEMPLATES)
    smaller: dict[str, Any] = {"validation_resolution": "128x128", "validation_num_inference_steps": 2, "max_train_steps": 4}
    smaller |= {"checkpoint_step_interval": 2, "log_step_interval": 1}
    model = workspace.config["pretrained_model_name_or_path"]
    workspace.config = {**config, **smaller, "pretrained_model_name_or_path": model}
    (workspace.folder / "config").mkdir(exist_ok=True)
    shutil.copyfile(TEMPLATES / "lycoris_config.json.example", workspace.folder / "config" / "lycoris_config.json")
    said = workspace.run("train", *words)
    return workspace.folder / config["output_dir"], said


def test_sana_is_trained_whole_and_its_average_with_it(workspace: Workspace) -> None:
    output, said = run_recipe(workspace, "sana-full")
    for folder in (output / "pipeline", output / "ema" / "pipeline"):
        pipeline = SanaPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert all(weight.isfinite().all() for weight in pipeline.transformer.parameters())
    trained = load_file(output / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in trained.values()} == {torch.bfloat16}
    assert sorted(path.name for path in (output / "validation").glob("step_4*")) == [
        "step_4_validation_0_128x128.png",
        "step_4_validation_ema_0_128x128.png",
    ]
    assert "no effect" not in said


def test_a_lokr_is_trained_as_its_file_says(workspace: Workspace) -> None:
    output, said = run_recipe(workspace, "sana-lokr")
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    kinds = {name.split(".")[0].rsplit("_", 1)[-1] for name in weights}
    assert all(".lokr_w" in name or name.endswith(".alpha") for name in weights)
    assert {"q", "k", "v", "inverted", "point"} <= kinds
    assert (output / "lycoris_config.json").is_file()
    assert "no effect" not in said


@pytest.mark.parametrize("words", [(), ("--lora_type=lycoris",)], ids=["lora", "lokr"])
def test_little_memory_suffices_for_an_adapter(workspace: Workspace, words: tuple[str, ...]) -> None:
    output, said = run_recipe(workspace, "sana-low-vram", *words)
    assert load_file(output / "pytorch_lora_weights.safetensors")
    assert "base_model_precision nf4-bnb: " in said
    assert "bnb-lion8bit-paged pages its state by CUDA" in said


def test_little_memory_does_not_suffice_for_full_tuning_and_the_way_out_is_said(workspace: Workspace) -> None:
    workspace.config |= {"model_type": "full", "base_model_precision": "nf4-bnb", "optimizer": "bnb-lion8bit-paged"}
    said = workspace.run("check", expect=2)
    assert '`base_model_precision` is "nf4-bnb", but `model_type` is "full".' in said
    assert 'Set `model_type` to "lora", with `lora_type` "standard" or "lycoris"' in said
