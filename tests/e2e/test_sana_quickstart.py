"""The Sana quickstart's dataset file, as printed there, on folders of the names it uses; and its ways to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import Workspace, environment
from tests.quickstarts import SANA_DATASETS


@pytest.fixture
def quickstart(workspace: Workspace) -> Workspace:
    folder = workspace.folder / "datasets"
    for name, number, size in (("pseudo-camera-10k", 3, (800, 600)), ("dreambooth-subject", 2, (1200, 1024))):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            image = Image.linear_gradient("L").resize(size).rotate(40 * index).convert("RGB")
            image.save(folder / name / f"a_grey_slope_{index}.jpg")
    workspace.datasets = json.loads(SANA_DATASETS)
    workspace.config |= {
        "max_train_steps": 4,
        "user_prompt_library": "config/user_prompt_library.json",
        "flow_schedule_auto_shift": True,
    }
    (workspace.folder / "config").mkdir()
    (workspace.folder / "config" / "user_prompt_library.json").write_text('{"anime_<token>": "an anime portrait of <token>"}')
    return workspace


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_dataset_file_trains_as_printed(quickstart: Workspace, model_type: str) -> None:
    said = quickstart.run("train", f"--model_type={model_type}", "--optimizer=torch-adamw", "--learning_rate=1e-5")
    ledger = json.loads((quickstart.folder / "output" / "ledger.json").read_text())["datasets"]
    assert {name: (account["found"], account["used"]) for name, account in ledger.items()} == {
        "pseudo-camera-10k-sana": (3, 3),
        "dreambooth-subject": (2, 2),
        "dreambooth-subject-512": (2, 2),
    }
    assert "<token> still stands" in said
    for cache in ("vae/sana/pseudo-camera-10k", "vae/sana/dreambooth-subject", "vae/sana/dreambooth-subject-512", "text/sana"):
        assert list((quickstart.folder / "cache" / cache).rglob("shard-*.safetensors")), cache
    names = sorted(path.name for path in (quickstart.folder / "output" / "validation").iterdir())
    assert names == ["step_4_anime__token_1_128x128.png", "step_4_validation_0_128x128.png"]


def test_the_plan_of_the_dataset_file_passes_a_thousand_and_one_times_over_the_subject(quickstart: Workspace) -> None:
    report = json.loads(quickstart.ask("check", "--json")[0])
    batches = {name: sum(row["batches"] for row in rows) for name, rows in report["buckets"].items()}
    assert batches == {"pseudo-camera-10k-sana": 2, "dreambooth-subject": 1001, "dreambooth-subject-512": 1001}


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launches_the_script_of_the_clone(workspace: Workspace, processes: int) -> None:
    """As the Cascade quickstart does, from the folder that holds `simpletuner/` and `config/`."""
    workspace.config |= {"validation_prompt": "", "max_train_steps": 2}
    workspace.write()
    clone = Path(__file__).parents[2]
    (workspace.folder / "simpletuner").symlink_to(clone / "simpletuner")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", f"--num_processes={processes}", "--num_machines=1"]
    if processes > 1:  # `--cpu` alone starts one process, whatever it is told (accelerate 1.15)
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    arguments = ["--config_file", "config/config.json", "--data_backend_config", "config/multidatabackend.json"]
    done = subprocess.run(
        [*launch, "simpletuner/train.py", *arguments],
        cwd=workspace.folder,
        env={**environment(), "ACCELERATE_USE_CPU": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (workspace.folder / "output" / "pytorch_lora_weights.safetensors").is_file()
    assert done.stderr.count("2 optimiser steps: ") == 1, "one rank speaks for all"
    assert "Warning" not in done.stderr
