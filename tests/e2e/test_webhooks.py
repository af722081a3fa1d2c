"""Whole runs that are told to webhooks: what arrives, and that their secrets lie nowhere afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Workspace
from tests.reporting.conftest import Server

TOKEN = "t0ken-of-mine"


def leaks(folder: Path, said: str, *secrets: str) -> list[str]:
    """Where one of them is found: in files of the run, or in what it said."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]
    return [*found, *(["what was said"] if any(secret in said for secret in secrets) else [])]


def test_a_run_is_told_from_its_beginning_to_its_end_and_a_silent_console_is_silent(
    workspace: Workspace, server: Server
) -> None:
    (workspace.folder / "config").mkdir()
    hooks = [
        {"callback_url": "{env:HOOK}", "auth_token": TOKEN, "log_level": "info"},
        {"webhook_url": f"{server.url}/discord", "log_level": "error"},
    ]
    (workspace.folder / "config" / "hooks.json").write_text(json.dumps(hooks))
    workspace.config |= {"webhook_config": "hooks.json", "max_train_steps": 2, "checkpoint_step_interval": 2}
    workspace.environment |= {"HOOK": server.url, "SIMPLETUNER_LOG_LEVEL": "error"}
    answer, said = workspace.ask("train")
    assert (answer, said) == ("", "")
    raw = [request.json for request in server.received if not request.path.endswith("?wait=true")]
    told = [event["type"] for event in raw if event["type"] != "notice"]
    assert told == ["run_started", "gallery", "step", "step", "saved", "saved", "gallery", "run_finished"]
    assert "Use it anywhere" in raw[-1]["text"]
    discord = [request for request in server.received if request.path.endswith("?wait=true")]
    assert len(discord) == len([kind for kind in told if kind != "step"])
    assert leaks(workspace.folder / "output", said, "s3cr3t", TOKEN) == []
    assert "hooks.json" in (workspace.folder / "output" / "config.json").read_text()


def test_a_run_that_fails_tells_why_and_its_messages_hold_no_secret(workspace: Workspace, server: Server) -> None:
    hook = {"webhook_type": "raw", "webhook_url": server.url, "auth_token": TOKEN, "message_prefix": "box 7: "}
    workspace.config["log_level"] = "debug"
    workspace.datasets[0] |= {"caption_strategy": "textfile", "instance_data_dir": "pictures"}
    said = workspace.run("train", "--webhook_config", json.dumps(hook), expect=2)
    last = server.received[-1]
    assert (last.json["type"], last.json["is_stopped"], last.json["prefix"]) == ("run_failed", False, "box 7: ")
    assert last.headers["Authorization"] == f"Bearer {TOKEN}"
    assert last.json["what"] in said
    assert last.json["mend"] in said
    assert leaks(workspace.folder / "output", said, "s3cr3t", TOKEN) == []


def test_frames_of_a_picture_arrive_in_order_while_it_is_made_and_training_does_not_notice(
    workspace: Workspace, server: Server, tiny_clip: Path
) -> None:
    """Two pictures are sampled before either is decoded, so that the first one's frames have time to arrive."""
    workspace.config |= {"max_train_steps": 2, "lora_dropout": 0.1, "validation_num_inference_steps": 20}
    alone = {**workspace.config}
    workspace.datasets.append({**workspace.datasets[0], "id": "held-out", "dataset_type": "eval"})
    workspace.config |= {
        "validation_resolution": "128x128,160x128",
        "validation_step_interval": 1,
        "disable_benchmark": True,
        "validation_preview": True,
        "validation_preview_steps": 5,
        "evaluation_type": "clip",
        "pretrained_evaluation_model_name_or_path": str(tiny_clip),
        "eval_steps_interval": 1,
        "eval_timesteps": 2,
    }
    workspace.run("train", "--webhook_config", json.dumps({"webhook_type": "raw", "webhook_url": server.url}))
    now_s, monotonic_s = time.time(), time.monotonic()
    told = [request for request in server.received if request.json["type"] in {"preview", "gallery"}]
    for step in (1, 2):
        *frames, gallery = [request for request in told if request.json["step"] == step]
        assert [frame.json["inference_step"] for frame in frames] == 2 * [5, 10, 15, 20]
        assert {(frame.json["type"], frame.json["inference_steps"]) for frame in frames} == {("preview", 20)}
        finished_s = [
            (workspace.folder / "output/validation" / one["file"]).stat().st_mtime for one in gallery.json["pictures"]
        ]
        assert len(finished_s) == 2
        assert all(frame.at_s - monotonic_s < min(finished_s) - now_s for frame in frames[:4])
    workspace.config = alone
    del workspace.config["validation_prompt"], workspace.datasets[1]
    workspace.run("train", "output_dir=alone")
    assert workspace.losses() == workspace.losses("alone")
    results = [load_file(workspace.folder / output / "pytorch_lora_weights.safetensors") for output in ("output", "alone")]
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())
