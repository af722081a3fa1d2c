"""A run with trackers and uploads, against a stand-in of the hub; and that no secret is anywhere afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from huggingface_hub import ModelCard
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.conftest import Workspace
from tests.reporting.conftest import Server
from tests.reporting.hub_stand_in import TOKEN, StandInHub

SECRETS = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "f4ce" * 10,
    "AWS_SECRET_ACCESS_KEY": "aws/fakeSecretOfATest",
    "AWS_SESSION_TOKEN": "aws/fakeSessionOfATest",
}
WRITTEN = ("s3cr3t", "t0ken-of-mine")
"""In a webhook's address, and its token: they stand in the config itself, then on the command line."""


def test_a_run_is_tracked_and_uploaded_and_tells_no_secret(workspace: Workspace, server: Server) -> None:
    workspace.config |= {
        "max_train_steps": 4,
        "checkpoint_step_interval": 2,
        "validation_step_interval": 2,
        "report_to": "wandb,tensorboard",
        "push_to_hub": True,
        "push_checkpoints_to_hub": True,
        "hub_model_id": "{env:HUB_NAME}",
        "webhook_config": {"callback_url": server.url, "auth_token": WRITTEN[1], "log_level": "debug"},
    }
    output = workspace.folder / "output"
    with StandInHub() as hub:
        hub.failures.append(503)
        home = str(workspace.folder / "home")
        workspace.environment = {
            **SECRETS,
            "HUB_NAME": "emoji",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": home,
            "HOME": home,
            "WANDB_MODE": "offline",
        }
        said = workspace.run("train", "--log_step_interval=1")
        first = len(hub.commits)
        text = (output / "README.md").read_text()
        (output / "README.md").write_text(f"{text}\nLicence: mine.\n")
        hook = json.dumps(workspace.config.pop("webhook_config")).replace("/", r"\/")
        said += workspace.run("train", "--log_step_interval=1", "--webhook_config", hook)

    # the hub
    messages = [commit.message for commit in hub.commits]
    assert messages[:first] == ["Upload checkpoint-2", "Upload checkpoint-4", "Upload the result"], said
    assert hub.private == {"tester/emoji": True}
    files = hub.files()
    assert files["pytorch_lora_weights.safetensors"] == (output / "pytorch_lora_weights.safetensors").read_bytes()
    assert load(files["checkpoint-2/pytorch_lora_weights.safetensors"])
    assert json.loads(files["checkpoint-4/manifest.json"])["files"], "a checkpoint from which a run goes on"
    assert "Uploaded the result to tester/emoji" in said

    # the card
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["license"] == "unknown"
    (shown,) = card.data.to_dict()["widget"]
    assert shown["text"] == "a red square"
    assert files[shown["output"]["url"]] == (output / "validation" / "step_4_validation_0_128x128.png").read_bytes()
    assert "hf download tester/emoji --local-dir emoji" in card.content
    assert "load_lora_weights('emoji/pytorch_lora_weights.safetensors')" in card.content
    assert "- pictures: 4" in card.content
    assert str(workspace.folder) not in card.content
    assert card.content.endswith("Licence: mine.\n"), "a finished run's card is uploaded as it is, not written anew"

    # the trackers
    board = EventAccumulator(str(output / "logs" / "tensorboard")).Reload()
    in_32_bits = {step: float(np.float32(loss)) for step, loss in workspace.losses().items()}
    assert {one.step: one.value for one in board.Scalars("loss")} == in_32_bits
    assert board.Images("validation/validation_0_128x128")[-1].step == 4
    assert board.Images("benchmark/validation_0_128x128")[0].step == 0
    assert "wandb sync output/logs/wandb/offline-run" in said
    assert list((output / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))

    # secrets
    places = {str(path): path.read_bytes() for path in workspace.folder.rglob("*") if path.is_file()}
    del places[str(workspace.folder / "config" / "config.json")]
    told = b"\n".join(request.body for request in server.received)
    assert told
    places |= {"said": said.encode(), "received": b"\n".join(hub.bodies), "told": told}
    secrets = (*SECRETS.values(), *WRITTEN)
    assert not [(secret, place) for secret in secrets for place, text in places.items() if secret.encode() in text]


def test_a_hub_that_refuses_stops_the_run_before_any_work_and_webhooks_hear_of_it(workspace: Workspace, server: Server) -> None:
    workspace.config |= {
        "push_to_hub": True,
        "hub_model_id": "somebody/else",
        "webhook_config": {"callback_url": server.url, "auth_token": "t0ken-of-mine"},
    }
    with StandInHub() as hub:
        workspace.environment = {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        said = workspace.run("train", expect=2)
    assert "does not let push_to_hub make or use the repository `somebody/else`" in said
    assert server.received[-1].json["type"] == "run_failed"
    assert server.received[-1].json["what"] in said
    assert not Path(workspace.folder / "output" / "cache").exists()
