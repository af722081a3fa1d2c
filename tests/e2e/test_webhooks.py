"""Whole runs that are told to webhooks: what arrives, and that their secrets lie nowhere afterwards."""

from __future__ import annotations

import json
from pathlib import Path

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
