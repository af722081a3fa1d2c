from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any, get_args

import pytest

from simpletuner.config.catalogue import PRECISIONS
from simpletuner.config.run import Hardware
from simpletuner.config.sections import Precision
from simpletuner.config.sections.precision import Stored
from simpletuner.errors import ConfigError

Project = Any
APPLE = Hardware("mps")
CARD = Hardware("cuda", has_bf16=True, capability=(8, 6))


def problems(project: Project, hardware: Hardware) -> list[str]:
    try:
        project.run(hardware=hardware)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_the_option_and_the_catalogue_name_the_same_formats() -> None:
    assert get_args(Stored) == ("no_change", *PRECISIONS)
    encoders = [field for name, field in Precision.model_fields.items() if name.startswith("text_encoder")]
    assert encoders
    assert all(field.annotation == Stored for field in encoders)


def test_every_alternative_that_is_named_works_there() -> None:
    for row in PRECISIONS.values():
        assert bool(row.not_on) == bool(row.instead)
        assert not {device for name in row.instead for device in PRECISIONS[name].not_on} & row.not_on.keys()


@pytest.mark.parametrize("option", ["base_model_precision", "text_encoder_1_precision"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fp8-quanto", 'Set it to "int8-quanto" or "int4-quanto"'),
        ("fp8-torchao", 'Set it to "int8-quanto" or "int4-quanto"'),
        ("nf4-bnb", 'Set it to "int4-quanto"'),
    ],
)
def test_what_apple_cannot_do_is_told_with_what_works_there(project: Project, option: str, value: str, words: str) -> None:
    project.options(**{option: value})
    [problem] = problems(project, APPLE)
    assert problem.startswith(f'`{option}` "{value}" does not work on mps.')
    assert words in problem


@pytest.mark.parametrize("hardware", [Hardware(), CARD, APPLE], ids=["cpu", "cuda", "mps"])
@pytest.mark.parametrize("value", PRECISIONS)
def test_everything_else_is_accepted(project: Project, value: str, hardware: Hardware) -> None:
    project.options(base_model_precision=value, text_encoder_1_precision=value)
    assert bool(problems(project, hardware)) == (hardware.device in PRECISIONS[value].not_on)


@pytest.mark.parametrize("value", PRECISIONS)
def test_a_full_fine_tune_of_a_quantised_base_is_refused_with_the_advice(project: Project, value: str) -> None:
    project.options(base_model_precision=value, model_type="full")
    [problem] = problems(project, CARD)
    assert f'`base_model_precision` is "{value}", but `model_type` is "full".' in problem
    assert '`model_type` to "lora", with `lora_type` "standard" or "lycoris"' in problem


def test_full_tuning_may_have_quantised_text_encoders(project: Project) -> None:
    project.options(text_encoder_1_precision="int8-quanto", quantize_via="cpu", model_type="full")
    assert not problems(project, CARD)


@pytest.mark.parametrize("value", PRECISIONS)
def test_a_missing_package_is_told_before_any_work_with_its_pip_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    row = PRECISIONS[value]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == row.module else find(name, *rest))
    project.options(base_model_precision=value)
    problem = project.problem()
    assert f"`base_model_precision={value}` needs the package `{row.module}`, which is not installed." in problem
    assert f"pip install 'simpletuner[{row.extra}]'" in problem


def test_looking_for_the_packages_imports_nothing_heavy() -> None:
    script = (
        "import sys; from simpletuner.errors import missing; from simpletuner.config.catalogue import PRECISIONS;"
        "print([missing(row.module, option='', extra='') for row in PRECISIONS.values()].count(None));"
        "print([name for name in ('torch', 'torchao', 'bitsandbytes', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [str(len(PRECISIONS)), "[]"]
