from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.catalogue import OPTIMIZERS, OptimizerRow
from simpletuner.config.run import Hardware
from simpletuner.errors import ConfigError

Project = Any


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"maximum_image_size": 1024}, "without `target_downsample_size`"),
        ({"target_downsample_size": 1024}, "without `maximum_image_size`"),
        ({"maximum_image_size": 512, "target_downsample_size": 1024}, "above `maximum_image_size`"),
        ({"caption_strategy": "instanceprompt"}, "no `instance_prompt`"),
        ({"caption_missing": "instance_prompt"}, "no `instance_prompt`"),
        ({"caption_strategy": "filename", "prepend_instance_prompt": True}, "no `instance_prompt`"),
        ({"caption_strategy": "textfile", "only_instance_prompt": True}, "no `instance_prompt`"),
        ({"caption_shuffle": {"coun": 2}}, "`caption_shuffle`"),
        ({"caption_shuffle": {"count": 0}}, "count"),
        ({"crop": True, "crop_style": "face"}, "cut the faces out beforehand"),
        ({"bucket_resolutions": ["1024x0"]}, "`bucket_resolutions`"),
        ({"bucket_resolutions": [[1024]]}, 'size such as "1024x768"'),
        ({"crop_aspect_buckets": {"wide": 1}}, "`crop_aspect_buckets`"),
        ({"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": {"1": 2}}, "has weights"),
        ({"start_epoch": 3, "end_epoch": 2}, "`end_epoch` (2) is before `start_epoch` (3)"),
        ({"start_step": 30, "end_step": 20}, "`end_step` (20) is before `start_step` (30)"),
        ({"probability": 0}, "above 0"),
        ({"crop": True, "crop_aspect": "closest"}, "no `crop_aspect_buckets`"),
        ({"crop": True, "crop_aspect": "random"}, "no `crop_aspect_buckets`"),
        ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, "`minimum_aspect_ratio`"),
        ({"resolution": 1024, "resolution_type": "area"}, "1024 megapixels"),
        ({"resolution": 1.0}, "1 pixels"),
        ({"minimum_image_size": 0.5}, "0.5 pixels"),
        ({"resolution": 0}, "`resolution` is 0"),
        ({"resolution": "0x512"}, "`resolution`"),
        ({"skip_file_discovery": "vae,oops"}, "oops"),
        ({"crop_aspect_buckets": [1, -1]}, "`crop_aspect_buckets`"),
        ({"is_regularisation_data": True}, "Every dataset is regularisation"),
        ({"cache_dir_vae": "datasets/pictures/cache"}, "within the pictures"),
        ({"instance_data_dir": "datasets/elsewhere"}, "does not exist"),
    ],
)
def test_a_dataset_that_cannot_be_meant_is_told(project: Project, keys: dict[str, Any], words: str) -> None:
    project.dataset(**keys)
    assert words in project.problem()


@pytest.mark.parametrize(
    "keys",
    [
        {"maximum_image_size": 1024, "target_downsample_size": 768},
        {"caption_strategy": "instanceprompt", "instance_prompt": "a cat"},
        {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": "0.75,1"},
        {"crop": False, "crop_aspect": "closest"},
        {"resolution": 1.0, "resolution_type": "area"},
        {"resolution": "1024x768"},
        {"skip_file_discovery": "vae, text"},
        {"minimum_image_size": 0},
        {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": '{"1": 2, "0.75": 1}'},
        {"start_epoch": 3, "end_epoch": 3, "start_step": 10, "end_step": 0},
        {"caption_shuffle": {"count": 3, "position_start": 1}},
        {"prepend_instance_prompt": True, "instance_prompt": "a cat"},
    ],
)
def test_a_dataset_that_makes_sense_passes(project: Project, keys: dict[str, Any]) -> None:
    project.dataset(**keys)
    assert len(project.run().datasets) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "torch-admw"}, 'Did you mean "torch-adamw"?'),
        ({"optimizer": "bnb-lion8bit-page"}, 'Did you mean "bnb-lion8bit-paged"?'),
        ({"optimizer_config": {"weight_decai": 0.1}}, "Did you mean `weight_decay`?"),
        ({"optimizer_config": "betas=0.9"}, "two numbers"),
        ({"optimizer_config": "betas=0.9,1.5"}, "two numbers"),
        ({"optimizer_config": "eps=-1"}, "at least 0"),
        ({"optimizer_config": "eps=inf"}, "at least 0"),
        ({"optimizer_config": "eps"}, 'it takes: object, or "key=value,key=value"'),
        ({"optimizer_config": "eps=x"}, "Write such a value"),
        ({"optimizer": "AdamW_BF16"}, 'Did you mean "adamw_bf16"?'),
        ({"optimizer": "optimi-lion", "optimizer_config": "eps=1"}, "optimi-lion has no setting `eps`"),
        ({"optimizer": "optimi-lion", "optimizer_config": "decouple_lr=1"}, "true or false"),
        ({"optimizer": "came", "optimizer_config": "betas=0.9,0.99"}, "three numbers between 0 and 1"),
        ({"optimizer": "came", "optimizer_config": "eps=1e-30"}, "two numbers at least 0"),
        ({"optimizer": "optimi-ranger", "optimizer_config": "k=2.5"}, "whole number, at least 1"),
        ({"optimizer": "torch-sgd", "optimizer_config": "momentum=none"}, "number from 0 to below 1"),
        ({"optimizer": "torch-sgd", "optimizer_config": "momentum=1"}, "number from 0 to below 1"),
        ({"optimizer": "prodigy", "optimizer_config": "d_coef=0"}, "number above 0"),
        ({"optimizer": "bnb-ademamix", "optimizer_config": "t_alpha=0"}, "whole number, at least 1, or none"),
        ({"optimizer": "torch-adafactor", "optimizer_config": "d=0.5"}, "number, at least 1"),
        ({"optimizer": "adamw_schedulefree", "optimizer_config": "betas=0,0.9"}, "two numbers between 0 and 1"),
        ({"validation_resolution": "large"}, "sizes by comma"),
        ({"output_dir": "datasets/pictures/output"}, "within the pictures"),
        ({"output_dir": "config/config.json"}, "which is a file"),
        ({"init_lora": "nowhere.safetensors"}, "does not exist"),
    ],
)
def test_options_that_cannot_be_meant_are_told(project: Project, options: dict[str, Any], words: str) -> None:
    project.options(**options)
    problems = project.problems()
    assert any(words in problem for problem in problems)


def test_a_run_folder_among_the_pictures_is_told_once_not_for_every_cache_in_it(project: Project) -> None:
    project.options(output_dir="datasets/pictures/output")
    assert project.problem().startswith("`output_dir` is datasets/pictures/output")


def test_a_cache_among_pictures_that_lie_in_the_run_folder_is_told(project: Project) -> None:
    project.options(output_dir="datasets")
    project.dataset(cache_dir_vae="datasets/pictures/cache")
    assert project.problem().startswith("`pictures.cache_dir_vae` is datasets/pictures/cache")


def test_the_only_text_cache_must_be_the_default(project: Project) -> None:
    pictures = {"id": "pictures", "instance_data_dir": "datasets/pictures"}
    project.datasets([pictures, {"id": "texts", "dataset_type": "text_embeds", "default": False}])
    assert "Dataset `texts`: `default` is false" in project.problem()


def test_settings_of_the_optimiser_are_handed_on(project: Project) -> None:
    run = project.run("--optimizer_config=betas=0.9,0.99,weight_decay=0")
    assert run.optimizer.optimizer_config == {"betas": [0.9, 0.99], "weight_decay": 0}


@pytest.mark.parametrize(
    ("name", "written", "settings"),
    [
        ("came", "betas=0.9,0.99,0.999,eps=1e-30,1e-8", {"betas": [0.9, 0.99, 0.999], "eps": [1e-30, 1e-8]}),
        ("prodigy", "safeguard_warmup=false,beta3=none,d_coef=2", {"safeguard_warmup": False, "beta3": None, "d_coef": 2}),
        ("bnb-ademamix8bit-paged", "t_alpha=100,t_beta3=None", {"t_alpha": 100, "t_beta3": None}),
        ("optimi-ranger", "k=3,decouple_lr=true", {"k": 3, "decouple_lr": True}),
    ],
)
def test_each_optimiser_takes_its_own_settings(project: Project, name: str, written: str, settings: dict[str, Any]) -> None:
    run = project.run(f"optimizer={name}", f"--optimizer_config={written}")
    assert run.optimizer.optimizer_config == settings


@pytest.mark.parametrize(("name", "row"), OPTIMIZERS.items())
def test_an_optimisers_default_settings_are_such_as_it_takes(name: str, row: OptimizerRow) -> None:
    ours = {"fused", "kahan_sum"}
    exempt = {"eps"} if name == "torch-adafactor" else set()  # its first one follows from the number format
    for key in row.settings.keys() - ours - exempt:
        assert row.accepts[key].fits(row.settings[key]), key


def test_a_package_that_is_not_installed_is_told_with_the_line_that_brings_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else ...)
    project.options(optimizer="bnb-adamw8bit")
    problem = project.problem()
    assert "`optimizer=bnb-adamw8bit` needs the package `bitsandbytes`" in problem
    assert "pip install 'simpletuner[bnb]'" in problem
    project.options(optimizer="optimi-adamw")
    project.run()


@pytest.mark.parametrize(
    ("name", "hardware", "words"),
    [
        ("bnb-adamw8bit", Hardware("mps"), 'not known to work on mps(.|\n)*to "adamw_bf16"'),
        ("ao-adamw8bit", Hardware("mps"), "not known to work on mps"),
        ("ao-adamwfp8", Hardware("cuda", capability=(8, 0)), 'capability 8.9; this one has 8.0(.|\n)*to "ao-adamw8bit"'),
    ],
)
def test_what_an_optimiser_cannot_do_on_a_machine_is_told_with_an_alternative(
    project: Project, name: str, hardware: Hardware, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        project.run(f"optimizer={name}", hardware=hardware)


@pytest.mark.parametrize(
    ("name", "hardware"),
    [
        ("bnb-adamw8bit", Hardware("cuda", has_bf16=True, capability=(8, 0))),
        ("ao-adamwfp8", Hardware("cuda", has_bf16=True, capability=(8, 9))),
        ("ao-adamwfp8", Hardware("cuda", has_bf16=True)),
        ("optimi-lion", Hardware("mps")),
    ],
)
def test_where_an_optimiser_works_nothing_is_refused(project: Project, name: str, hardware: Hardware) -> None:
    assert project.run(f"optimizer={name}", hardware=hardware).optimizer.optimizer == name


def test_a_compiled_optimiser_without_a_compiler_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    project.options(optimizer="ao-adamw8bit")
    assert "there is no C++ compiler" in project.problem()


def test_full_tuning_may_train_on_regularisation_data_alone(project: Project) -> None:
    project.dataset(is_regularisation_data=True)
    assert project.run("model_type=full").datasets[0].is_regularisation_data
