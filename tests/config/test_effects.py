from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.effects import holds

Project = Any


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("", True),
        ("a=x|y", True),
        ("a=z", False),
        ("a!=z", True),
        ("a!=x|y", False),
        ("b=true", True),
        ("a=x and b=true", True),
        ("a=x and b=false", False),
        ("a=z or b=true", True),
        ("a=z or a=x and b=false", False),
        ("c>0", True),
        ("c>0.5", False),
        ("unset>0", False),
        ("a", True),
        ("a and b=false", False),
        ("unset", False),
        ("unset=unset", True),
        ("c=unset", False),
        ("empty or a=y", False),
    ],
)
def test_a_condition_is_read_as_it_is_written(when: str, expected: bool) -> None:
    assert holds(when, {"a": "x", "b": True, "c": 0.5, "unset": None, "empty": ()}) is expected


def test_a_written_option_that_is_not_obeyed_is_told(project: Project) -> None:
    notices = project.run("model_type=full", "lora_rank=8").notices
    assert "`lora_rank` has no effect here: it is obeyed only with model_type=lora and lora_type=standard." in notices


def test_a_datasets_key_that_is_not_obeyed_is_told_with_its_dataset(project: Project) -> None:
    project.dataset(crop_style="center")
    assert any(line.startswith("Dataset `pictures`: `crop_style` has no effect") for line in project.run().notices)


def test_an_obeyed_option_or_a_plain_default_is_not_told(project: Project) -> None:
    project.dataset(crop=True, crop_style="center")
    assert not any("no effect" in line for line in project.run("model_type=full", "lora_rank=16").notices)


@pytest.mark.parametrize(
    ("written", "idle"),
    [
        (["huber_c=0.2"], "huber_c"),
        (["huber_schedule=snr"], "huber_schedule"),
        (["huber_c=0.2", "loss_type=smooth_l1"], None),
        (["input_perturbation_steps=100"], "input_perturbation_steps"),
        (["input_perturbation_steps=100", "input_perturbation=0.1"], None),
    ],
)
def test_a_setting_of_a_loss_or_perturbation_that_is_off_is_told(
    project: Project, written: list[str], idle: str | None
) -> None:
    told = [line for line in project.run(*written).notices if "no effect" in line]
    assert [line.split("`")[1] for line in told] == ([idle] if idle else [])


def test_auto_shift_beside_a_shift_is_said(project: Project) -> None:
    notices = project.run("flow_schedule_shift=1", "--flow_schedule_auto_shift").notices
    assert any("`flow_schedule_shift` has no effect" in line for line in notices)
