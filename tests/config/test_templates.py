"""The files that a clone carries for users to copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.load import build, parse
from simpletuner.config.run import Hardware
from simpletuner.config.sources import read_json
from simpletuner.errors import ConfigError
from simpletuner.families import find
from tests.quickstarts import CASCADE_CONFIG, CASCADE_DATASETS, CASCADE_LIBRARY

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


@pytest.mark.parametrize(
    "name",
    ["sd3.json", "sd3-slg.json", "sd3-stable.json", "sd3-low-vram.json", "sd3.env"],
)
def test_each_of_sd3s_templates_loads_and_all_of_it_is_obeyed(copied: Path, name: str) -> None:
    entries = read_json(copied / "config" / "multidatabackend.json", copied)
    (copied / entries[0]["instance_data_dir"]).mkdir(parents=True)
    run = load(copied, "--config_file", f"config/{name}")
    assert run.model.model_family == "sd3"
    assert not any("no effect" in notice for notice in run.notices)


def test_the_low_memory_template_trains_at_512_px_by_itself(copied: Path) -> None:
    (copied / "datasets" / "my-pictures").mkdir(parents=True)
    [dataset] = load(copied, "--config_file=config/sd3-low-vram.json", "--optimizer=adamw_bf16").datasets
    assert dataset.resolution == 512


def test_skip_layers_are_read_however_they_are_written(copied: Path) -> None:
    entries = read_json(copied / "config" / "multidatabackend.json", copied)
    (copied / entries[0]["instance_data_dir"]).mkdir(parents=True)
    for written in ("[7,8,9]", "[7, 8, 9]", "7,8,9", "7, 8, 9"):
        run = load(copied, "--config_file", "config/sd3.json", f"--validation_guidance_skip_layers={written}")
        assert run.family.validation_guidance_skip_layers == (7, 8, 9)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--validation_guidance_skip_layers=7,8,9", "it belongs to sd3"),
        ("--t5_padding=zero", "it belongs to sd3"),
    ],
)
def test_sd3s_own_options_are_refused_for_sana_with_the_reason(copied: Path, argument: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(copied, argument)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--text_encoder_3_precision=int8-quanto"], "`text_encoder_3_precision` has no effect here"),
        (
            ["--config_file=config/sd3.json", "--validation_guidance_skip_scale=5"],
            "`validation_guidance_skip_scale` has no effect here: it is obeyed only with validation_guidance_skip_layers.",
        ),
        (
            ["--config_file=config/sd3-slg.json", "--validation_guidance=7"],
            "validation_guidance 7 is high for skip-layer guidance",
        ),
        (
            ["--config_file=config/sd3.json", "--tokenizer_max_length=256", "--i_know_what_i_am_doing"],
            "`tokenizer_max_length` is 256",
        ),
    ],
)
def test_what_has_no_effect_or_a_doubtful_one_is_told(copied: Path, arguments: list[str], told: str) -> None:
    entries = read_json(copied / "config" / "multidatabackend.json", copied)
    (copied / entries[0]["instance_data_dir"]).mkdir(parents=True)
    assert any(told in notice for notice in load(copied, *arguments).notices)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_t5_never_runs_in_float16(copied: Path, mixed_precision: str) -> None:
    entries = read_json(copied / "config" / "multidatabackend.json", copied)
    (copied / entries[0]["instance_data_dir"]).mkdir(parents=True)
    run = load(copied, "--config_file=config/sd3.json", f"--mixed_precision={mixed_precision}")
    assert run.dtypes.text in ("float32", "bfloat16")


def test_the_stable_cascade_templates_load_as_they_are_once_the_pictures_are_there(copied: Path) -> None:
    (copied / "datasets" / "my-pictures").mkdir(parents=True)
    run = load(copied, "--config_file=config/stable-cascade.json")
    assert (run.model.model_family, run.model.model_flavour) == ("stable_cascade", "stage-c")
    assert run.dtypes.base == run.dtypes.trained == "float32"
    assert run.optimizer.optimizer == "torch-adamw"
    assert run.datasets[0].vae_batch_size == 1
    assert not any("no effect" in notice for notice in run.notices)
    assert not run.has_tiles


def test_the_cascade_pages_whole_config_and_library_load(copied: Path) -> None:
    (copied / "data").mkdir()
    datasets = json.loads(CASCADE_DATASETS.replace("/data/stable-cascade", "data"))
    config = json.loads(CASCADE_CONFIG)
    (copied / "config" / "stable_cascade").mkdir()
    (copied / config["data_backend_config"]).write_text(json.dumps(datasets))
    (copied / "config" / "stable_cascade" / "prompt_library.json").write_text(CASCADE_LIBRARY)
    (copied / "page.json").write_text(json.dumps(config))
    run = load(copied, "--config_file=page.json", "--validation_prompt_library=config/stable_cascade/prompt_library.json")
    options: Any = run.family
    assert options.stable_cascade_decoder_subfolder == "decoder_lite"
    assert options.stable_cascade_validation_prior_guidance_scale == 3.5
    assert (run.training.max_train_steps, run.training.num_train_epochs) == (30000, 0)
    assert run.precision.base_model_default_dtype == "fp32"
    assert (run.dtypes.base, run.dtypes.trained, run.dtypes.autocast) == ("float32", "float32", None)
    assert run.datasets[0].resolution == (1024, 1024)
    assert any("adamw_bf16 keeps float32 weights here" in notice for notice in run.notices)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_stable_cascade_keeps_float32_weights_under_autocast_where_the_guard_is_overridden(
    copied: Path, model_type: str
) -> None:
    (copied / "datasets" / "my-pictures").mkdir(parents=True)
    arguments = ("--config_file=config/stable-cascade.json", "--mixed_precision=bf16", f"--model_type={model_type}")
    with pytest.raises(ConfigError, match="Stable Cascade Stage C requires --mixed_precision=no"):
        load(copied, *arguments)
    run = load(copied, *arguments, "--i_know_what_i_am_doing", "--optimizer=adamw_bf16")
    assert (run.dtypes.base, run.dtypes.trained, run.dtypes.autocast) == ("float32", "float32", "bfloat16")
    assert any("Going on" in notice for notice in run.notices)


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
