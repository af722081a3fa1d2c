"""A base of few bits, as a user meets it: told, trained over, stopped, and gone on with."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Workspace

LORA = "pytorch_lora_weights.safetensors"


def test_a_stopped_run_over_an_int8_base_goes_on_as_if_unbroken_and_tells_what_it_saved(workspace: Workspace) -> None:
    workspace.config |= {
        "base_model_precision": "int8-quanto",
        "text_encoder_1_precision": "int8-quanto",
        "learning_rate": 1e-3,
        "validation_prompt": "",
        "max_train_steps": 4,
    }
    forks, workspace.forks = workspace.forks, None  # afresh: what libraries say when they are imported is tested too
    said = workspace.run("train", "--output_dir=unbroken")
    workspace.forks = forks
    assert "base_model_precision int8-quanto: " in said
    assert " layers quantised, " in said
    assert "Failed to load" not in said
    assert "KernelPreference" not in said
    workspace.run("train", "--output_dir=broken", "--max_train_steps=2")
    said = workspace.run("train", "--output_dir=broken", "--quantize_via=cpu")
    assert "Going on from broken/checkpoint-2, step 2 of 4" in said
    assert "quantize_via 'accelerator' -> 'cpu'" in said
    assert workspace.losses("broken") == workspace.losses("unbroken")
    ours, theirs = (load_file(workspace.folder / output / LORA) for output in ("broken", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    recipes = [json.loads(path.read_text()) for path in (workspace.folder / "unbroken/cache/text").rglob("recipe.json")]
    assert [recipe["facts"]["precision"] for recipe in recipes] == ["int8-quanto"]
