"""Sets of one, three and twenty-five pictures, with every key of captions and sampling, at batch 4 x accumulation 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.cli import main
from tests.e2e.conftest import Workspace

ASPECTS = [(64 + 16 * n, 128 - 8 * n) for n in range(10)]
KEYS: dict[int, dict[str, Any]] = {
    1: {"train_batch_size": 2, "start_step": 3, "caption_shuffle": {"count": 2}},
    3: {"prepend_instance_prompt": True, "instance_prompt": "sks,", "probability": 0.5, "end_step": 5},
    25: {"max_num_samples": 20},
}


@pytest.fixture
def small(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    workspace.datasets = []
    for count, keys in KEYS.items():
        folder = workspace.folder / f"of-{count}"
        folder.mkdir()
        for n in range(count):
            Image.new("RGB", ASPECTS[n % 10], (9 * n, 90, 40)).save(folder / f"of {count}, cold, number {n}.png")
        workspace.datasets.append({"id": folder.name, "instance_data_dir": folder.name, "resolution": 64, **keys})
    workspace.config |= {"train_batch_size": 4, "gradient_accumulation_steps": 2, "validation_prompt": "", "seed": 3}
    workspace.config |= {"lr_scheduler": "constant", "learning_rate": 1e-3, "max_train_steps": 8}
    workspace.write()
    monkeypatch.chdir(workspace.folder)
    return workspace


def test_a_few_pictures_train_and_a_run_goes_on_where_a_set_has_started_and_one_has_ended(
    small: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--output_dir=whole"]) == 0
    said = capsys.readouterr().err
    assert "prompts (gemma): 0 reused, 27 encoded" in said, "none, one in three orders, three that begin with sks, and twenty"
    for stop in (4, 8):
        assert main(["train", "--output_dir=broken", f"--max_train_steps={stop}"]) == 0
    assert small.losses("broken") == small.losses("whole")
    assert len(small.losses("whole")) == 8
    ledger = json.loads((Path("whole") / "ledger.json").read_text())["datasets"]
    assert [account["used"] for account in ledger.values()] == [1, 3, 20]
