from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.lycoris import effective
from tests.config.conftest import Fake, Project

TYPICAL = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}


def test_a_users_file_is_read_as_it_stands(project: Project) -> None:
    project.write("config/lycoris_config.json", json.dumps(TYPICAL))
    project.options(lora_type="lycoris", lycoris_config="config/lycoris_config.json")
    run = project.run()
    assert run.adapter.lycoris_config == "config/lycoris_config.json"
    assert effective(run.adapter, Fake.lycoris_presets) == {**TYPICAL, "conv_dim": 10000, "conv_alpha": 1}


@pytest.mark.parametrize("written", [TYPICAL, json.dumps(TYPICAL)], ids=["object", "text"])
def test_it_may_stand_in_the_config_itself(project: Project, written: Any) -> None:
    project.options(lora_type="lycoris", lycoris_config=written)
    assert project.run().adapter.lycoris_config == TYPICAL


def test_without_one_there_is_a_lokr_and_it_is_said(project: Project) -> None:
    project.options(lora_type="lycoris")
    run = project.run()
    assert any("lycoris_config is not set: LoKr of factor 16" in line for line in run.notices)
    settings = effective(run.adapter, Fake.lycoris_presets)
    assert (settings["algo"], settings["factor"], settings["linear_dim"]) == ("lokr", 16, 10000)
    assert settings["apply_preset"] == {"target_module": ["Attention", "FeedForward"]}
    assert not any("lycoris" in line for line in project.run("lora_type=standard").notices)


def test_a_preset_that_names_no_layers_means_all_of_them(project: Project) -> None:
    for preset in ({}, {"apply_preset": {"exclude_name": ["x"]}}, {"apply_preset": "full"}):
        project.options(lora_type="lycoris", lycoris_config={"algo": "loha", **preset})
        assert effective(project.run().adapter, Fake.lycoris_presets)["apply_preset"]["target_module"] == ["Linear"]


def test_settings_of_null_are_unset(project: Project) -> None:
    project.options(lora_type="lycoris", lycoris_config={"algo": "full", "linear_dim": None})
    assert effective(project.run().adapter, Fake.lycoris_presets)["linear_dim"] == 4


def test_everything_that_is_wrong_is_told_at_once(project: Project) -> None:
    config = {
        "algo": "lokrr",
        "faktor": 8,
        "linear_dim": "16",
        "use_scalar": True,
        "apply_preset": {"target_modules": [], "module_algo_map": {"Attention": {"linear_dim": 4, "algo": "lora"}}},
    }
    project.options(lora_type="lycoris", lycoris_config=config)
    problems = project.problems()
    words = [
        "`algo` is 'lokrr'.\nWhy:  it takes: one of lora, locon, loha, lokr, full.\nMend: Did you mean \"lokr\"?",
        "it has no setting `faktor`.",
        "Did you mean `factor`?",
        "`linear_dim` is '16'",
        "`use_scalar` is True",
        "it has no setting `apply_preset.target_modules`.",
        "Did you mean `target_module`?",
        "it has no setting `apply_preset.module_algo_map.Attention.linear_dim`.",
    ]
    assert len(problems) == 6
    for word in words:
        assert any(word in problem for problem in problems), word


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"apply_preset": "attn-mpl"}, {}, 'this family\'s: attn-mlp, full.\nMend: Did you mean "attn-mlp"?'),
        ({"algo": "full"}, {"base_model_precision": "int8-quanto"}, '`algo` "full" cannot train here'),
        ({"bypass_mode": False}, {"base_model_precision": "int8-quanto"}, "`bypass_mode` is false"),
        ({"dora_wd": True}, {"base_model_precision": "int8-quanto"}, "`dora_wd` is true"),
        ({"dora_wd": True, "bypass_mode": True}, {}, "are both true"),
        ({"dora_wd": True, "dropout": 0.1}, {}, "`dropout` is 0.1 beside `dora_wd`"),
        ({"algo": "lokr", "use_tucker": True}, {}, '`use_tucker` is true and `algo` is "lokr"'),
        ({"apply_preset": {"name_algo_map": {"x": 4}}}, {}, "`apply_preset.name_algo_map.x` is 4"),
        ({"multiplier": 0}, {}, "a number above 0"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(project: Project, config: Any, options: Any, words: str) -> None:
    project.options(lora_type="lycoris", lycoris_config=config, **options)
    assert words in project.problem()


def test_a_file_that_is_missing_broken_or_no_object_is_told(project: Project) -> None:
    project.options(lora_type="lycoris", lycoris_config="config/lycoris.json")
    assert "does not exist" in project.problem()
    project.write("config/lycoris.json", '{"algo": "lokr"')
    assert "config/lycoris.json is not valid JSON: line 1" in project.problem()
    project.write("config/lycoris.json", "[]")
    assert "config/lycoris.json holds no object" in project.problem()


def test_it_has_no_effect_without_lycoris_and_that_is_told(project: Project) -> None:
    project.options(lycoris_config={"algo": "nonsense"})
    assert any("`lycoris_config` has no effect here" in line for line in project.run().notices)
    project.options(lora_type="lycoris", lora_rank=8)
    assert any("`lora_rank` has no effect here" in line for line in project.run().notices)


def test_an_unknown_target_preset_is_told_with_the_familys_names(project: Project) -> None:
    project.options(lora_target_preset="atention")
    problem = project.problem()
    assert "fake has: attention, full." in problem
    assert 'Did you mean "attention"?' in problem


def test_target_modules_may_be_written_by_comma_and_must_name_something(project: Project) -> None:
    assert project.run("--peft_lora_target_modules=to_q,to_k").adapter.peft_lora_target_modules == ("to_q", "to_k")
    project.options(peft_lora_target_modules=[])
    assert "is an empty list" in project.problem()
    project.options(peft_lora_target_modules=["to_q"], lora_target_preset="full")
    assert any("`lora_target_preset` has no effect here" in line for line in project.run().notices)
