"""A set of pictures that is held out, from the command line: judged at its intervals, and alike after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.e2e.conftest import Workspace


def test_a_held_out_set_is_judged_while_training_and_the_same_after_a_resume(workspace: Workspace) -> None:
    held_out = workspace.folder / "held-out"
    held_out.mkdir()
    for number, size in enumerate([(128, 128), (300, 200), (130, 140)]):
        Image.new("RGB", size, (10, 80 * number, 200)).save(held_out / f"something_else_{number}a.png")
    workspace.datasets.append(
        {**workspace.datasets[0], "id": "held-out", "instance_data_dir": "held-out", "dataset_type": "eval"}
    )
    workspace.config |= {"max_train_steps": 4, "eval_steps_interval": 3, "eval_epoch_interval": 1, "eval_timesteps": 3}
    del workspace.config["validation_prompt"]
    said = workspace.run("train", "checkpoint_step_interval=4")
    rows = judged(workspace.folder / "output")
    assert [row["step"] for row in rows] == [0, 2, 3, 4], "two steps make an epoch"
    assert rows[0]["eval_loss"] == rows[0]["eval_loss_base"]
    assert rows[-1]["eval_loss"] != rows[0]["eval_loss"]
    assert [len(curve) for curve in rows[0]["curves"].values()] == [3, 3]
    assert f"eval loss at step 4: {rows[-1]['eval_loss']:.4f} (base {rows[0]['eval_loss_base']:.4f})" in said
    assert "held-out (eval): 3 found = 3 used + 0 excluded" in said
    assert "held-out: 0 reused, 3 encoded" in said
    files = json.loads((workspace.folder / "output" / "ledger.json").read_text())["datasets"]
    assert files["held-out"]["dataset_type"] == "eval"

    said = workspace.run("train", "max_train_steps=5")
    assert "held-out: 3 reused" in said
    again, last = judged(workspace.folder / "output")[4:]
    assert {**again, "time": ""} == {**rows[-1], "time": ""}
    assert (last["step"], last["eval_loss_base"]) == (5, rows[0]["eval_loss_base"])


def judged(output: Path) -> list[dict]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row.get("kind") == "eval"]
