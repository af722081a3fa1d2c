"""The gallery by the command line: odd names, strengths, previews, scores, and a folder that takes no pictures at first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

LIBRARY = {
    "anime_<token>": {"prompt": "a cat", "adapter_strength": 0.5},
    "a/b\\..": "a <b>dog</b>",
    "😀": "a river",
    "x" * 300: "a tower",
}


def test_a_gallery_that_cannot_be_written_stops_no_training_and_is_painted_by_the_next_start(
    workspace: Any, tiny_clip: Path
) -> None:
    (workspace.folder / "config").mkdir()
    (workspace.folder / "config" / "library.json").write_text(json.dumps(LIBRARY))
    workspace.config |= {
        "max_train_steps": 3,
        "validation_prompt_library": "library.json",
        "validation_epoch_interval": 0.5,
        "disable_benchmark": True,
        "validation_preview": True,
        "validation_preview_steps": 2,
        "evaluation_type": "clip",
        "pretrained_evaluation_model_name_or_path": str(tiny_clip),
    }
    output = workspace.folder / "output"
    output.mkdir()
    (output / "validation").touch()  # as good as a full disk
    said = workspace.run("train")
    assert "output/previews" in said
    assert "kept in memory" in said
    assert "start the same command again" in said
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert not (output / "gallery.html").exists()
    (output / "validation").unlink()
    workspace.run("train")
    pictures = sorted((output / "validation").iterdir())
    assert len(pictures) == 1 + len(LIBRARY)
    assert all(path.name.startswith("step_3_") for path in pictures)
    assert len(list((output / "previews").iterdir())) == len(pictures)
    with Image.open(next(path for path in pictures if "anime" in path.name)) as image:
        assert (image.info["nickname"], image.info["adapter_strength"]) == ("anime_<token>", "0.5")
    page = (output / "gallery.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;dog&lt;/b&gt;" in page
