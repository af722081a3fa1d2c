from __future__ import annotations

import json
from typing import Any

from tests.quickstarts import SANA_DATASETS

Project = Any


def test_the_sana_pages_datasets_load_as_written(project: Project) -> None:
    for name in ("pseudo-camera-10k", "dreambooth-subject"):
        (project.root / "datasets" / name).mkdir()
    project.write("config/multidatabackend.json", SANA_DATASETS)
    run = project.run()
    assert [dataset.id for dataset in run.datasets] == [
        "pseudo-camera-10k-sana",
        "dreambooth-subject",
        "dreambooth-subject-512",
    ]
    for dataset, written in zip(run.datasets, json.loads(SANA_DATASETS), strict=False):
        assert written.items() <= dataset.model_dump().items()
    assert run.text_embeds.cache_dir == "cache/text/sana"
    assert run.notices == (
        "mixed_precision is no: this machine (cpu) has no fast bf16.",
        "model_flavour is small: no model was named.",
        "Training ends after 2000 steps: neither max_train_steps nor num_train_epochs is set.",
    )


def test_an_entry_is_an_image_set_unless_it_says_otherwise(project: Project) -> None:
    project.dataset(dataset_type="images")
    assert project.run().datasets[0].dataset_type == "image"


def test_an_unknown_kind_of_entry_is_told(project: Project) -> None:
    project.dataset(dataset_type="video")
    assert '`dataset_type` is "video"' in project.problem()


def test_keys_of_an_entry_are_spelled_as_freely_as_options(project: Project) -> None:
    project.dataset(**{"--crop": "true", "CROP-STYLE": "center", "resolution": "1024x768", "is_regularization_data": "no"})
    [dataset] = project.run().datasets
    assert (dataset.crop, dataset.crop_style, dataset.resolution) == (True, "center", (1024, 768))


def test_kohyas_number_of_passes_becomes_extra_passes_with_a_notice(project: Project) -> None:
    project.dataset(num_repeats=3)
    run = project.run()
    assert run.datasets[0].repeats == 2
    assert any("`num_repeats` is read as `repeats`: 2" in line for line in run.notices)


def test_no_pass_at_all_is_refused(project: Project) -> None:
    project.dataset(num_repeats=0)
    assert "`repeats` is -1" in project.problem()


def test_dataset_keys_of_the_main_config_are_defaults_that_an_entry_overrides(project: Project) -> None:
    project.options(resolution=512, caption_strategy="textfile", write_batch_size=16)
    project.datasets(
        [
            {"id": "a", "instance_data_dir": "datasets/pictures"},
            {"id": "b", "instance_data_dir": "datasets/pictures", "resolution": 768, "caption_strategy": None},
        ]
    )
    run = project.run("--vae_batch_size", "2")
    first, second = run.datasets
    assert (first.resolution, first.caption_strategy, first.vae_batch_size) == (512, "textfile", 2)
    assert (second.resolution, second.caption_strategy) == (768, "filename")
    assert run.text_embeds.write_batch_size == 16
    assert run.sources["a.vae_batch_size"] == "command line"
    assert run.sources["b.resolution"] == "file config/multidatabackend.json"


def test_a_default_that_every_dataset_overrides_is_said_to_change_nothing(project: Project) -> None:
    project.dataset(resolution=512)
    assert any("`resolution` (command line) changes nothing" in line for line in project.run("resolution=256").notices)
    project.datasets(
        [
            {"id": name, "instance_data_dir": "datasets/pictures"} | more
            for name, more in (("a", {"resolution": 512}), ("b", {}))
        ]
    )
    assert not any("changes nothing" in line for line in project.run("resolution=256").notices)


def test_the_list_of_datasets_may_be_written_on_the_command_line(project: Project) -> None:
    run = project.run("--data_backend_config", '[{"id": "here", "instance_data_dir": "datasets/pictures"}]')
    assert [dataset.id for dataset in run.datasets] == ["here"]


def test_a_wrong_default_is_told_once_not_for_every_dataset(project: Project) -> None:
    project.options(vae_batch_size="many")
    project.datasets([{"id": name, "instance_data_dir": "datasets/pictures"} for name in "abc"])
    assert '`vae_batch_size` is "many" (file config/config.json)' in project.problem()


def test_a_familys_default_of_a_dataset_key_holds(project: Project) -> None:
    run = project.run()
    assert (run.datasets[0].vae_batch_size, run.sources["pictures.vae_batch_size"]) == (3, "family")


def test_a_set_may_have_a_batch_size_of_its_own_beside_the_runs(project: Project) -> None:
    project.options(train_batch_size=4)
    project.datasets(
        [
            {"id": name, "instance_data_dir": "datasets/pictures", **more}
            for name, more in (("a", {"train_batch_size": 2}), ("b", {}))
        ]
    )
    run = project.run()
    assert run.training.train_batch_size == 4
    assert [dataset.train_batch_size for dataset in run.datasets] == [2, None]


def test_keys_that_only_an_entry_can_say_are_no_defaults(project: Project) -> None:
    project.options(instance_data_dir="datasets/pictures")
    assert "write it in the datasets' file" in project.problem()


def test_a_main_option_in_an_entry_is_sent_to_its_place(project: Project) -> None:
    project.dataset(learning_rate=1e-4)
    assert "main config" in project.problem()


def test_a_disabled_entry_is_left_out_unread(project: Project) -> None:
    project.datasets(
        [
            {"id": "pictures", "instance_data_dir": "datasets/pictures", "disabled": "false"},
            {"disabled": "true", "type": "aws", "x": 1},
        ]
    )
    assert len(project.run().datasets) == 1


def test_no_enabled_pictures_is_a_problem(project: Project) -> None:
    project.datasets([])
    assert "There is no image dataset" in project.problem()
    project.dataset(disabled=True)
    assert "There is no image dataset" in project.problem()


def test_what_an_entry_must_say_is_asked_for(project: Project) -> None:
    project.datasets([{"resolution": 512}, {"id": "b"}])
    first, second = project.problems()
    assert "number 1: `id` is missing" in first
    assert "`b`: `instance_data_dir` is missing" in second


def test_an_entry_that_is_no_object_is_told(project: Project) -> None:
    project.datasets(["pictures"])
    assert "Entry 1" in project.problem()


def test_datasets_that_are_no_list_are_told(project: Project) -> None:
    project.write("config/multidatabackend.json", '{"id": "a"}')
    assert "are no list" in project.problem()


def test_bad_json_in_the_datasets_is_told_with_its_place_beside_other_problems(project: Project) -> None:
    project.options(seed=-1)
    project.write("config/multidatabackend.json", "[{]")
    problems = project.problems()
    assert len(problems) == 2
    assert "multidatabackend.json is not valid JSON: line 1, column 3" in problems[1]


def test_a_missing_datasets_file_says_where_it_was_looked_for(project: Project) -> None:
    (project.root / "config" / "multidatabackend.json").unlink()
    assert "no file config/multidatabackend.json" in project.problem()
    project.options(data_backend_config="elsewhere.json")
    assert "elsewhere.json" in project.problem()


def test_the_text_cache_entry_is_optional(project: Project) -> None:
    run = project.run("output_dir=out")
    assert (run.text_embeds.id, run.text_embeds.cache_dir) == ("text-embeds", "out/cache/text")


def test_two_text_caches_are_one_too_many(project: Project) -> None:
    texts = [{"id": name, "dataset_type": "text_embeds", "cache_dir": name} for name in "ab"]
    project.datasets([{"id": "pictures", "instance_data_dir": "datasets/pictures"}, *texts])
    assert "2 entries have the dataset_type" in project.problem()


def test_the_datasets_may_stand_in_the_config_itself(project: Project) -> None:
    project.options(data_backend_config=[{"id": "inner", "instance_data_dir": "datasets/pictures"}])
    assert [dataset.id for dataset in project.run().datasets] == ["inner"]
