"""What is not on this machine yet, over a stand-in for the hub's cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from simpletuner.families.downloads import Download, downloads

MB = 10**6


@dataclass
class Cached:
    """A hub repository of which a folder is here."""

    root: Path
    variant: str | None = None
    name: str = "someone/model"
    revision: str | None = None
    is_local: bool = False

    def here(self, path: str) -> Path | None:
        return self.root / path if (self.root / path).is_file() else None


def write(folder: Path, *files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).write_text("{}")


SIZES = {
    "vae/config.json": 1, "vae/model.safetensors": 5 * MB, "vae/model.fp16.safetensors": 2 * MB, "vae/model.bin": 5 * MB,
    "effnet.safetensors": 3 * MB,
}  # fmt: skip


@pytest.mark.parametrize(("variant", "size"), [(None, 5 * MB + 1), ("fp16", 2 * MB + 1), ("bf16", 5 * MB + 1)])
def test_a_component_that_is_not_here_is_told_with_the_size_of_the_weights_that_will_be_read(
    tmp_path: Path, variant: str | None, size: int
) -> None:
    repository: Any = Cached(tmp_path, variant)
    write(tmp_path / "vae", "config.json")  # as reading the model's shape leaves it
    found = downloads([(repository, "vae"), (repository, "effnet.safetensors")], ask=lambda _: SIZES)
    assert found == [Download("someone/model", "vae", size), Download("someone/model", "effnet.safetensors", 3 * MB)]


def test_each_repository_is_asked_once_and_silence_is_no_size(tmp_path: Path) -> None:
    repository: Any = Cached(tmp_path)
    asked: list[Any] = []
    found = downloads([(repository, "vae"), (repository, "transformer")], ask=asked.append)
    assert [each.size_bytes for each in found] == [None, None]
    assert asked == [repository]
    assert [each.size_bytes for each in downloads([(repository, "vae")])] == [None], "the hub is off in tests"


def test_what_is_here_whole_is_no_download_and_a_shard_too_few_is_one(tmp_path: Path) -> None:
    repository: Any = Cached(tmp_path)
    write(tmp_path / "vae", "config.json", "model.safetensors")
    write(tmp_path / "tokenizer", "tokenizer_config.json")
    write(tmp_path, "effnet.safetensors")
    write(tmp_path / "transformer", "config.json", "model-00001-of-00002.safetensors")
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "transformer" / "model.safetensors.index.json").write_text(json.dumps(shards))
    needs = [(repository, part) for part in ("vae", "tokenizer", "effnet.safetensors", "transformer")]
    assert [each.part for each in downloads(needs)] == ["transformer"]
    write(tmp_path / "transformer", "model-00002-of-00002.safetensors")
    assert downloads(needs) == []


def test_a_model_that_is_no_pipeline_lies_at_the_top_of_its_repository(tmp_path: Path) -> None:
    repository: Any = Cached(tmp_path)
    sizes = {"config.json": 2, "model.safetensors": 3 * MB, "model.bin": 9 * MB, "vae/model.safetensors": 5 * MB}
    assert downloads([(repository, "")], ask=lambda _: sizes) == [Download("someone/model", "", 3 * MB + 2)]
    write(tmp_path, "config.json", "model.safetensors")
    assert downloads([(repository, "")]) == []


def test_components_without_weights_are_here_with_their_settings(tmp_path: Path) -> None:
    repository: Any = Cached(tmp_path)
    parts = [(repository, "tokenizer_2"), (repository, "feature_extractor")]
    assert len(downloads(parts, ask=lambda _: None)) == 2
    write(tmp_path / "tokenizer_2", "tokenizer_config.json")
    write(tmp_path / "feature_extractor", "preprocessor_config.json")
    assert downloads(parts, ask=lambda _: None) == []
