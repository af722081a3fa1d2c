"""Encoding while training, as a user meets it: the same numbers as with caches, and what is and is not written."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from tests.e2e.conftest import Workspace


def gallery(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("validation/*.png"))}


def shards(folder: Path) -> list[Path]:
    return list((folder / "cache").rglob("shard-*"))


def test_encoding_while_training_changes_no_number(workspace: Workspace) -> None:
    """Crops drawn, captions dropped, a gallery with a negative prompt; then a cache that fills, and a picture cut short."""
    workspace.datasets[0] |= {"vae_batch_size": 3, "crop_style": "random"}
    workspace.config |= {"caption_dropout_probability": 0.3, "validation_negative_prompt": "blurry", "disable_benchmark": True}
    workspace.run("train", "output_dir=cached")
    said = workspace.run("train", "output_dir=bare", "--vae_cache_disable", "--text_cache_disable")
    said = " ".join(said.split())
    for what, encoder in (("pictures", "dc-ae"), ("captions", "gemma")):
        assert f"{what} are encoded while training, and not cached." in said
        assert f"What encodes them stays loaded beside the model: {encoder}." in said
    cached, bare = (workspace.folder / name for name in ("cached", "bare"))
    assert workspace.losses("bare") == workspace.losses("cached")
    assert gallery(bare) == gallery(cached)
    weights, same = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (cached, bare))
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())
    assert (len(shards(cached)), shards(bare)) == (2, [])

    whole = (workspace.folder / "pictures" / "a_red_square.png").read_bytes()
    (workspace.folder / "pictures" / "a_torn_square.png").write_bytes(whole[: len(whole) // 2])
    (workspace.folder / "masks").mkdir()
    for picture in (workspace.folder / "pictures").glob("*.png"):
        size = Image.open(picture).size
        Image.new("L", size, 255 if "river" in picture.name else 0).save(workspace.folder / "masks" / picture.name)
    workspace.datasets[0] |= {"conditioning_data": "masks", "image_embeds": "kept"}
    workspace.datasets.append({"id": "masks", "dataset_type": "conditioning", "instance_data_dir": "masks"})
    workspace.datasets.append({"id": "kept", "dataset_type": "image_embeds", "cache_dir": "filling/cache/kept"})
    said = workspace.run("train", "output_dir=filling", "--vae_cache_ondemand", "--text_cache_ondemand")
    assert "pictures: a_torn_square.png is unreadable: damaged" in " ".join(said.split())
    kinds = {path.parent.parent.name for path in shards(workspace.folder / "filling")}
    assert kinds == {"kept", "text"}
    assert "masks are black there: a_blue_dot.png, a_red_square.png, a_tall_tower.png, a_torn_square.png" in " ".join(
        said.split()
    )
    assert 0 in workspace.losses("filling").values(), "a batch of black masks alone"
    account = json.loads((workspace.folder / "filling" / "ledger.json").read_text())["datasets"]["pictures"]
    [note] = [one["note"] for one in account["notes"] if "unreadable" in one["note"]]
    assert note.startswith("unreadable, found while training: damaged")
    assert note.endswith(".png takes its place")
