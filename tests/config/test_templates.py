"""The files that a clone carries for users to copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.load import build, parse
from simpletuner.config.run import Hardware
from simpletuner.config.sources import read_json
from simpletuner.families import find

TEMPLATES = Path(__file__).parents[2] / "config"
FAMILIES: Any = find()


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the templates were copied as the quickstarts say."""
    (tmp_path / "config").mkdir()
    for template in TEMPLATES.glob("*.example"):
        shutil.copyfile(template, tmp_path / "config" / template.stem)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, *argv: str) -> Any:
    return build(parse(argv, families=FAMILIES, environ={}, cwd=folder), Hardware())


def test_the_templates_load_as_they_are_once_the_pictures_are_there(copied: Path) -> None:
    entries = read_json(copied / "config" / "multidatabackend.json", copied)
    (copied / entries[0]["instance_data_dir"]).mkdir(parents=True)
    run = load(copied)
    assert [dataset.id for dataset in run.datasets] == [entries[0]["id"]]
    assert not any("no effect" in notice for notice in run.notices)


def test_the_prompt_library_has_the_form_of_the_quickstart(copied: Path) -> None:
    assert read_json(copied / "config" / "user_prompt_library.json", copied) == {
        "nickname": "the prompt goes here",
        "another_nickname": "another prompt goes here",
    }


def test_the_sana_pages_changes_work_on_the_template(copied: Path) -> None:
    """What the Sana quickstart sets, as far as this version declares it."""
    entries = read_json(copied / "config" / "multidatabackend.json", copied)
    (copied / entries[0]["instance_data_dir"]).mkdir(parents=True)
    run = load(
        copied,
        "--model_type=full",
        "--pretrained_model_name_or_path=terminusresearch/sana-1.6b-1024px",
        "--output_dir=/tmp/somewhere",
        "--train_batch_size=6",
        "--validation_resolution=1024x1024,1280x768,2048x2048",
        "--validation_guidance=4.5",
        "--validation_num_inference_steps=50",
        "--mixed_precision=bf16",
        "--gradient_checkpointing",
        "--gradient_checkpointing_interval=2",
        "--user_prompt_library=config/user_prompt_library.json",
    )
    assert run.validation.validation_prompt_library == "config/user_prompt_library.json"
    assert run.memory.gradient_checkpointing_interval == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*-*.json.example")))
def test_each_recipe_loads_as_it_is_with_nothing_idle(copied: Path, name: str) -> None:
    entries = read_json(copied / "config" / "multidatabackend.json", copied)
    (copied / entries[0]["instance_data_dir"]).mkdir(parents=True)
    run = load(copied, f"--config_file=config/{name}")
    assert not any("no effect" in notice for notice in run.notices)
