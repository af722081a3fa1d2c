from __future__ import annotations

from typing import Any

import pytest

Project = Any


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"maximum_image_size": 1024}, "without `target_downsample_size`"),
        ({"target_downsample_size": 1024}, "without `maximum_image_size`"),
        ({"maximum_image_size": 512, "target_downsample_size": 1024}, "above `maximum_image_size`"),
        ({"caption_strategy": "instanceprompt"}, "no `instance_prompt`"),
        ({"caption_missing": "instance_prompt"}, "no `instance_prompt`"),
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
    ],
)
def test_a_dataset_that_makes_sense_passes(project: Project, keys: dict[str, Any]) -> None:
    project.dataset(**keys)
    assert len(project.run().datasets) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "torch-adam"}, 'Did you mean "torch-adamw"?'),
        ({"optimizer_config": {"weight_decai": 0.1}}, "Did you mean `weight_decay`?"),
        ({"optimizer_config": "betas=0.9"}, "two numbers"),
        ({"optimizer_config": "betas=0.9,1.5"}, "two numbers"),
        ({"optimizer_config": "eps=-1"}, "at least 0"),
        ({"optimizer_config": "eps=inf"}, "at least 0"),
        ({"optimizer_config": "eps"}, "`optimizer_config`"),
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


def test_full_tuning_may_train_on_regularisation_data_alone(project: Project) -> None:
    project.dataset(is_regularisation_data=True)
    assert project.run("model_type=full").datasets[0].is_regularisation_data
