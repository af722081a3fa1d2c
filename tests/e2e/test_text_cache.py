"""`simpletuner text-cache` for every family: what it encodes, what it loads, and that training then loads no encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner import cli
from simpletuner.config.run import Run
from simpletuner.data.cache import TensorCache
from simpletuner.data.prompts import prompt_bytes
from simpletuner.data.samples import Prompt
from simpletuner.examples.tiny import model_options
from simpletuner.families import common, find

CAPTIONS = ["a red square", "a red square", "a blue dot", "a wide river"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(params=find())
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, tmp_path: Path, tiny_repo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config for this family: four pictures of three captions, and a gallery."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (140, 140), (60 * number, 100, 90)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(caption)
    config = {
        "model_family": family,
        **model_options(family, tiny_repo(family)),
        "mixed_precision": "no",
        "max_train_steps": 1,
        "validation_prompt": "a green cat",
        "validation_negative_prompt": "blurry",
        "validation_resolution": "128x128",
        "validation_num_inference_steps": 1,
        "disable_benchmark": True,
        "text_encoder_batch_size": 2,
    }
    datasets = [{"id": "pictures", "instance_data_dir": "pictures", "resolution": 128, "caption_strategy": "textfile"}]
    (tmp_path / "config.json").write_text(json.dumps({**config, "data_backend_config": "datasets.json"}))
    (tmp_path / "datasets.json").write_text(json.dumps(datasets))
    return tmp_path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The components whose weights are loaded."""
    names: list[str] = []
    load = common.load_whole

    def note(model_class: Any, component: Any, dtype: str) -> Any:
        names.append(component.folder.name)
        return load(model_class, component, dtype)

    monkeypatch.setattr(common, "load_whole", note)
    return names


def run_of(folder: Path) -> Run:
    return cli._load(["--config_file", str(folder / "config.json")])


def test_all_prompts_are_encoded_once_and_a_following_training_loads_no_text_encoder(
    folder: Path, family: str, loaded: list[str], capsys: Captured
) -> None:
    assert cli.main(["text-cache"]) == 0
    encoders = find()[family](run_of(folder)).text_encoders()
    assert len(loaded) == len(encoders)
    assert all("text_encoder" in name for name in loaded), "denoiser and autoencoder are none of its business"
    cache = TensorCache(folder / "output" / "cache" / "text", encoders[0].recipe)
    assert len(cache.keys()) == 3 + 1 + 2, "three captions, the dropped one, the gallery's two"
    assert "6 prompts, 0 missing" in capsys.readouterr().out
    assert cli.main(["text-cache", "--verify"]) == 0
    loaded.clear()
    assert cli.main(["text-cache"]) == 0
    assert loaded == []
    assert cli.main(["train"]) == 0
    assert loaded
    assert not [name for name in loaded if "text_encoder" in name]


def test_a_dry_run_counts_and_loads_nothing(folder: Path, family: str, loaded: list[str], capsys: Captured) -> None:
    assert cli.main(["text-cache", "--dry-run"]) == 0
    answer = capsys.readouterr().out
    assert "6 prompts, 6 missing" in answer
    assert "still to be written" in answer
    assert loaded == []
    assert not list((folder / "output").rglob("shard-*"))


def test_a_prompt_takes_no_more_bytes_than_was_said(folder: Path, family: str) -> None:
    longest = Prompt("word " * 1000)
    for encoder in find()[family](run_of(folder)).text_encoders():
        with encoder.lent("cpu") as encode:
            [embeds] = encode([longest])
        assert sum(tensor.nbytes for tensor in embeds.values()) == prompt_bytes(encoder)


def test_what_is_missing_or_damaged_is_found_by_verify(folder: Path, family: str, capsys: Captured) -> None:
    assert cli.main(["text-cache", "--verify"]) == 1
    assert "6 of 6 prompts are not in the cache" in capsys.readouterr().err
    assert cli.main(["text-cache"]) == 0
    shard = next((folder / "output" / "cache" / "text").rglob("shard-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert cli.main(["text-cache", "--verify"]) == 1


def test_missing_captions_are_no_success(folder: Path, family: str, loaded: list[str], capsys: Captured) -> None:
    (folder / "pictures" / "2.txt").unlink()
    assert cli.main(["text-cache"]) == 2
    assert "2.png" in capsys.readouterr().err
    assert loaded == []


def test_two_questions_at_once_are_refused(folder: Path, family: str) -> None:
    assert cli.main(["text-cache", "--verify", "--dry-run"]) == 2


def test_the_console_script_is_the_same_command() -> None:
    packaging = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'simpletuner-text-cache = "simpletuner.cli:text_cache_main"' in packaging


def test_where_captions_are_not_cached_there_is_nothing_to_do(folder: Path, family: str, capsys: Captured) -> None:
    assert cli.main(["text-cache", "--text_cache_disable"]) == 2
    assert "`text_cache_disable` is set" in capsys.readouterr().err
