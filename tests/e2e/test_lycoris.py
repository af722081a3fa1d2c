"""The Sana quickstart's LoKr recipe through the command line: a config file, AdamW at 1e-4."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Workspace

WEIGHTS = "pytorch_lora_weights.safetensors"
LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}


@pytest.fixture
def recipe(workspace: Workspace) -> Workspace:
    for option in ("lora_rank", "lora_alpha", "learning_rate"):
        del workspace.config[option]
    workspace.config |= {
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "config/lycoris_config.json",
        "optimizer": "torch-adamw",
        "checkpoint_step_interval": 2,
        "validation_step_interval": 6,
    }
    (workspace.folder / "config").mkdir()
    (workspace.folder / "config" / "lycoris_config.json").write_text(json.dumps(LOKR))
    return workspace


def lycoris_config(folder: Path) -> Any:
    return json.loads((folder / "lycoris_config.json").read_text())


def test_the_lokr_recipe_trains_and_a_killed_run_ends_in_the_same_weights(recipe: Workspace) -> None:
    said = recipe.run("train", "--output_dir=unbroken")
    assert "lycoris_config names FeedForward, which this denoiser does not have" in said
    assert "GLUMBConv" in said
    assert "from lycoris import create_lycoris_from_weights" in said
    unbroken = recipe.folder / "unbroken"
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert {row["learning_rate"] for row in rows if "kind" not in row} == {1e-4}
    assert list((unbroken / "validation").glob("step_6_*.png"))
    saved = unbroken / "checkpoint-6"
    assert lycoris_config(unbroken) == lycoris_config(saved) == {**LOKR, "conv_dim": 10000, "conv_alpha": 1}

    process = recipe.start("train", "--output_dir=broken")
    end = time.monotonic() + 120
    while not (recipe.folder / "broken" / "checkpoint-2" / "manifest.json").is_file():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recipe.run("train", "--output_dir=broken")
    ours, theirs = (load_file(recipe.folder / output / WEIGHTS) for output in ("broken", "unbroken"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(tensor.any() for name, tensor in ours.items() if name.endswith("lokr_w2"))
    assert recipe.losses("broken") == recipe.losses("unbroken")

    (recipe.folder / "config" / "lycoris_config.json").write_text(json.dumps({**LOKR, "factor": 4}))
    said = recipe.run("train", "--output_dir=broken", expect=2)
    assert "lycoris_config.factor was 16, now 4" in said
