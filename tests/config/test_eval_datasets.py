from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.resolved import explain, resolved
from tests.config.conftest import PICTURES

Project = Any

HELD_OUT = {"id": "held-out", "dataset_type": "eval", "instance_data_dir": "datasets/held-out"}


@pytest.fixture
def judged(project: Project) -> Project:
    (project.root / "datasets" / "held-out").mkdir()
    project.datasets([HELD_OUT, PICTURES])
    return project


def test_an_eval_set_is_opened_like_the_others_and_is_none_of_those_trained_on(judged: Project) -> None:
    run = judged.run()
    assert [entry.id for entry in run.datasets] == ["pictures"]
    assert [(entry.id, entry.dataset_type) for entry in run.eval_datasets] == [("held-out", "eval")]
    assert [entry.id for entry in run.picture_sets] == ["pictures", "held-out"]
    assert run.eval_datasets[0].cache_dir_vae == "output/cache/vae/held-out"


def test_what_is_saved_of_a_run_has_its_eval_sets_and_loads_again(judged: Project) -> None:
    run = judged.run()
    judged.config(resolved(run))
    assert judged.run().eval_datasets == run.eval_datasets
    assert "dataset_type eval" in explain(run).replace('"', "")


def test_keys_of_training_have_no_effect_on_an_eval_set_and_that_is_told(judged: Project) -> None:
    judged.datasets([{**HELD_OUT, "repeats": 3}, PICTURES])
    told = "Dataset `held-out`: `repeats` has no effect here: it is obeyed only with dataset_type=image."
    assert told in judged.run().notices


def test_an_eval_set_alone_is_nothing_to_train_on(judged: Project) -> None:
    judged.datasets([HELD_OUT])
    assert "There is no image dataset." in judged.problem()


def test_an_eval_sets_keys_are_judged_by_the_same_rules(judged: Project) -> None:
    judged.datasets([{**HELD_OUT, "caption_strategy": "instanceprompt"}, PICTURES])
    assert "Dataset `held-out`: `caption_strategy` is" in judged.problem()


def test_an_eval_set_that_is_switched_off_is_not_opened(judged: Project) -> None:
    judged.options(eval_loss_disable=True)
    assert [entry.id for entry in judged.run().picture_sets] == ["pictures"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 500),
        ({"checkpoint_step_interval": 70}, 70),
        ({"eval_epoch_interval": 0.5}, 0),
        ({"eval_epoch_interval": 0.5, "eval_steps_interval": 20}, 20),
        ({"eval_epoch_interval": 0}, 500),
    ],
)
def test_the_loss_is_told_as_often_as_is_saved_unless_an_interval_is_set(
    judged: Project, options: dict[str, Any], steps: int
) -> None:
    judged.options(**options)
    assert judged.run().eval_loss.eval_steps_interval == steps


def test_options_of_the_eval_loss_without_a_set_to_judge_by_are_told(project: Project) -> None:
    project.options(eval_timesteps=5)
    told = "`eval_timesteps` has no effect here: there is no dataset of the dataset_type `eval`."
    assert [line for line in project.run().notices if "eval" in line] == [told]


def test_a_number_of_pictures_to_judge_limits_the_eval_sets_alone_so_that_no_others_are_encoded(judged: Project) -> None:
    run = judged.run("--num_eval_images=10")
    assert [entry.max_num_samples for entry in run.picture_sets] == [None, 10]
    judged.datasets([{**HELD_OUT, "max_num_samples": 4}, PICTURES])
    assert judged.run("--num_eval_images=10").eval_datasets[0].max_num_samples == 4
