from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.resolved import changes, explain, flat, resolved

Project = Any


@pytest.mark.parametrize(
    "keys",
    [
        {"resolution": "512x768", "crop_aspect_buckets": [0.5, 2]},
        {"bucket_resolutions": ["512x768", 512], "crop_aspect": "random", "crop_aspect_buckets": {"0.5": 1, "2": 2}},
        {"caption_shuffle": {"count": 2}, "train_batch_size": 3, "start_step": 7},
    ],
)
def test_a_resolved_run_is_a_config_that_gives_the_same_run(project: Project, keys: dict[str, Any]) -> None:
    project.options(lora_rank=8, optimizer_config="betas=0.9,0.99", fake_strength=2, resume_from_checkpoint="")
    project.dataset(crop=True, **keys)
    first = project.run("--seed", "3")
    project.write("again/config.json", json.dumps(resolved(first)))
    second = project.run("--config_file", "again/config.json")
    assert resolved(second) == resolved(first)
    assert (second.datasets, second.text_embeds, second.dtypes) == (first.datasets, first.text_embeds, first.dtypes)


def test_what_a_variable_holds_is_neither_saved_nor_shown(project: Project) -> None:
    project.options(output_dir="{env:PLACE}/out")
    project.dataset(instance_prompt="{env:PLACE} it is")
    run = project.run(environ={"PLACE": "hidden"})
    assert run.datasets[0].instance_prompt == "hidden it is"
    saved = resolved(run)
    assert saved["output_dir"] == "{env:PLACE}/out"
    written = [line for line in explain(run).splitlines() if "{env:PLACE}" in line]
    assert len(written) == 2


def test_flattening_names_a_datasets_keys_as_the_sources_do(project: Project) -> None:
    run = project.run()
    assert set(flat(resolved(run))) <= set(run.sources)


def test_sets_that_came_or_went_are_told_as_such_and_others_by_what_changed_of_them() -> None:
    def config(rate: float, *sets: dict[str, Any]) -> dict[str, Any]:
        return {"learning_rate": rate, "data_backend_config": sets}

    cats, dogs, owls = ({"id": name, "repeats": 0} for name in ("cats", "dogs", "owls"))
    assert changes(config(0.1, cats, dogs), config(0.1, cats, dogs)) == []
    assert changes(config(0.1, cats, dogs), config(0.2, owls, {**dogs, "repeats": 3})) == [
        "dataset owls was added", "dataset cats was removed", "dogs.repeats 0 -> 3", "learning_rate 0.1 -> 0.2",
    ]  # fmt: skip
    assert changes(config(0.1, cats, dogs), config(0.1, dogs, cats)) == ["the datasets stand in another order"]


def test_what_is_no_core_default_is_explained_with_its_source(project: Project) -> None:
    project.options(lora_rank=8)
    project.dataset(repeats=2)
    rows: dict[str, dict[str, str]] = {}
    for line in explain(project.run("--seed=3", "model_flavour=large")).splitlines():
        if line.endswith(":"):
            source = line[:-1]
        else:
            rows.setdefault(source, {})[line.split()[0]] = line.split()[1]
    assert list(rows) == [
        "family",
        "flavour",
        "derived",
        "file config/config.json",
        "file config/multidatabackend.json",
        "command line",
    ]
    assert rows["command line"] == {"model_flavour": '"large"', "seed": "3"}
    assert rows["file config/config.json"] == {"model_family": '"fake"', "lora_rank": "8"}
    assert rows["flavour"]["max_grad_norm"] == "0.7"
    assert rows["derived"]["learning_rate"] == "0.0001"


def test_what_a_dataset_says_is_one_paragraph_that_breaks_between_values(project: Project) -> None:
    project.dataset(caption_strategy="instanceprompt", instance_prompt="a photo of zwx, a small ginger cat, " * 2, crop=True)
    text = explain(project.run())
    said = text.partition("file config/multidatabackend.json:\n")[2].splitlines()
    assert said[0].startswith('  dataset pictures: instance_data_dir "datasets/pictures", crop true,')
    assert len(said) == 2
    assert said[1].startswith('      instance_prompt "a photo')


def test_a_whole_number_is_shown_without_a_point(project: Project) -> None:
    project.dataset(resolution=512)
    assert "resolution 512" in explain(project.run()).splitlines()[-1]
