"""Kill -9 at any time, then the same command: it goes on, and nobody can tell from the result."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Workspace

LORA = "pytorch_lora_weights.safetensors"


def wait_for(condition, process, timeout_s: float = 120) -> None:
    """Until `condition()`; the process must still run."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("shard-*.safetensors"))}


@pytest.mark.parametrize(
    ("model_type", "optimizer", "mixed_precision", "use_ema"),
    [
        ("lora", "torch-adamw", "no", True),
        ("lora", "adamw_bf16", "bf16", False),
        ("full", "adamw_bf16", "bf16", True),
        ("full", "torch-adamw", "bf16", False),
    ],
)
def test_a_run_killed_in_training_ends_in_the_weights_of_an_unbroken_one(
    workspace: Workspace, model_type: str, optimizer: str, mixed_precision: str, use_ema: bool
) -> None:
    workspace.config |= {
        "model_type": model_type,
        "optimizer": optimizer,
        "mixed_precision": mixed_precision,
        "use_ema": use_ema,
        "learning_rate": 1e-3,
        "max_train_steps": 8,
        "checkpoint_step_interval": 2,
        "validation_step_interval": 4,
        "gradient_accumulation_steps": 2,
    }
    workspace.run("train", "--output_dir=unbroken")
    process = workspace.start("train", "--output_dir=broken")
    wait_for((workspace.folder / "broken" / "checkpoint-4" / "manifest.json").is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = workspace.run("train", "--output_dir=broken")
    result = LORA if model_type == "lora" else "pipeline/transformer/diffusion_pytorch_model.safetensors"
    for file in [result, f"ema/{result}"] if use_ema else [result]:
        ours, theirs = (load_file(workspace.folder / output / file) for output in ("broken", "unbroken"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert workspace.losses("broken") == workspace.losses("unbroken")
    assert "Going on from" in said or "Finished" in said


def test_a_run_killed_while_caching_goes_on_and_its_caches_are_the_same(workspace: Workspace) -> None:
    from PIL import Image

    for number in range(60):
        Image.effect_noise((160 + number, 170), 60).convert("RGB").save(workspace.folder / "pictures" / f"noise_{number}.png")
    workspace.datasets[0] |= {"write_batch_size": 4, "vae_batch_size": 2}
    workspace.config |= {"max_train_steps": 2, "validation_prompt": ""}
    workspace.run("train", "--output_dir=unbroken")
    process = workspace.start("train", "--output_dir=broken")
    cache = workspace.folder / "broken" / "cache" / "vae"
    wait_for(lambda: len(shards(cache)) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = shards(cache)
    workspace.run("train", "--output_dir=broken")
    final = shards(cache)
    assert kept.items() <= final.items(), "what was finished is kept as it was"
    ours, theirs = (items(workspace.folder / output / "cache") for output in ("broken", "unbroken"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert workspace.losses("broken") == workspace.losses("unbroken")


def items(cache: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a cache, however it is cut into shards."""
    return {name: tensor for path in cache.rglob("shard-*.safetensors") for name, tensor in load_file(path).items()}


def test_ctrl_c_saves_tells_how_to_go_on_and_exits_130(workspace: Workspace) -> None:
    workspace.config |= {"max_train_steps": 100_000, "validation_prompt": ""}
    process = workspace.start("train")
    wait_for(lambda: (workspace.folder / "output" / "metrics.jsonl").is_file() and len(workspace.losses()) > 2, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "simpletuner train" in said
    [checkpoint] = (workspace.folder / "output").glob("checkpoint-*")
    assert int(checkpoint.name.removeprefix("checkpoint-")) == max(workspace.losses())
