from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.run import Hardware

Project = Any


def test_each_layer_wins_over_the_one_beneath_and_every_value_knows_its_source(project: Project) -> None:
    project.options(seed=1, lora_rank=8, learning_rate=3e-4)
    run = project.run("--seed", "3", environ={"SIMPLETUNER_SEED": "2", "SIMPLETUNER_LORA_RANK": "4"})
    assert (run.training.seed, run.sources["seed"]) == (3, "command line")
    assert (run.adapter.lora_rank, run.sources["lora_rank"]) == (4, "environment")
    assert (run.optimizer.learning_rate, run.sources["learning_rate"]) == (3e-4, "file config/config.json")
    assert (run.optimizer.max_grad_norm, run.sources["max_grad_norm"]) == (0.1, "family")
    assert (run.adapter.lora_alpha, run.sources["lora_alpha"]) == (4.0, "derived")
    assert (run.training.train_batch_size, run.sources["train_batch_size"]) == (1, "core")


def test_what_is_written_wins_over_the_family_even_where_it_equals_the_core(project: Project) -> None:
    project.options(max_grad_norm=1.0)
    run = project.run()
    assert (run.optimizer.max_grad_norm, run.sources["max_grad_norm"]) == (1.0, "file config/config.json")


def test_a_containers_bare_variables_change_nothing(project: Project) -> None:
    run = project.run(environ={"SEED": "7", "ENV": "elsewhere", "OUTPUT_DIR": "/tmp/x", "LORA_RANK": "1"})
    assert (run.training.seed, run.checkpointing.output_dir, run.adapter.lora_rank) == (42, "output", 16)


def test_an_unknown_variable_of_ours_is_told_but_stops_nothing(project: Project) -> None:
    notices = project.run(environ={"SIMPLETUNER_LERNING_RATE": "1"}).notices
    assert any("SIMPLETUNER_LERNING_RATE" in line and "SIMPLETUNER_LEARNING_RATE" in line for line in notices)


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_value_is_unset(project: Project, empty: object) -> None:
    project.options(learning_rate=empty, lora_rank=empty, validation_prompt=empty)
    run = project.run()
    assert (run.optimizer.learning_rate, run.adapter.lora_rank, run.validation.validation_prompt) == (1e-4, 16, None)


def test_an_empty_value_unsets_the_layers_beneath(project: Project) -> None:
    project.options(validation_prompt="a cat")
    assert project.run("--validation_prompt=").validation.validation_prompt is None


def test_an_empty_resume_starts_afresh_and_null_is_unset(project: Project) -> None:
    project.options(resume_from_checkpoint="")
    assert project.run().checkpointing.resume_from_checkpoint == ""
    project.options(resume_from_checkpoint=None)
    assert project.run().checkpointing.resume_from_checkpoint == "latest"
    assert project.run("resume_from_checkpoint=").checkpointing.resume_from_checkpoint == ""


def test_synonyms_are_read_with_a_notice(project: Project) -> None:
    project.options(model_flavor="large", checkpointing_steps=50, validation_steps=25)
    run = project.run()
    assert run.model.model_flavour == "large"
    assert run.checkpointing.checkpoint_step_interval == 50
    assert run.validation.validation_step_interval == 25
    assert any("`checkpointing_steps` is read as `checkpoint_step_interval`" in line for line in run.notices)


def test_two_spellings_of_one_option_may_not_differ(project: Project) -> None:
    project.options(**{"seed": 1, "--seed": 2})
    assert "`seed` is given twice, as 1 and as 2" in project.problem()
    project.options(**{"seed": 1, "--seed": 1})
    assert project.run().training.seed == 1


def test_the_last_word_of_a_command_line_wins(project: Project) -> None:
    assert project.run("--seed=1", "seed=2").training.seed == 2


def test_a_variable_in_a_value_is_expanded_and_never_shown(project: Project) -> None:
    project.options(output_dir="{env:BASE}/out")
    run = project.run(environ={"BASE": "/secret"})
    assert run.checkpointing.output_dir == "/secret/out"
    assert run.written["output_dir"] == "{env:BASE}/out"


def test_a_missing_variable_is_a_problem_that_names_it(project: Project) -> None:
    project.options(output_dir="{env:BASE}/out")
    assert "BASE is not set" in project.problem()


def test_all_problems_of_both_files_and_the_command_line_are_told_at_once(project: Project) -> None:
    project.config(
        {
            "model_family": "fake",
            "model_flavour": "larg",
            "lerning_rate": 1,
            "max_train_steps": -1,
            "optimizer": "adamw_bf17",
            "flow_use_uniform_schedule": True,
            "flow_use_beta_schedule": True,
            "validation_prompt_library": "nowhere.json",
            "fake_strength": 9,
        }
    )
    project.datasets(
        [
            {"id": "a", "instance_data_dir": "datasets/pictures", "maximum_image_size": 1024, "crop_aspekt": "square"},
            {"id": "a", "instance_data_dir": "datasets/nothing", "caption_strategy": "instanceprompt"},
        ]
    )
    problems = project.problems("--seed", "many")
    wanted = [
        'flavour "larg"',
        "`lerning_rate`",
        "`max_train_steps` is -1",
        '"adamw_bf17"',
        "`flow_use_uniform_schedule` and `flow_use_beta_schedule`",
        "nowhere.json",
        "Too strong",
        "`crop_aspekt`",
        "datasets/nothing",
        "there is no `instance_prompt`",
        "id `a`",
        "without `target_downsample_size`",
        '`seed` is "many" (command line)',
    ]
    assert [word for word in wanted if not any(word in problem for problem in problems)] == []
    assert len(problems) == len(wanted)


def test_a_wrong_value_is_told_with_place_value_and_what_is_wanted(project: Project) -> None:
    project.options(lr_scheduler="cosin")
    assert project.problem().splitlines() == [
        '`lr_scheduler` is "cosin" (file config/config.json).',
        "Why:  it takes: one of constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, sine.",
        'Mend: Did you mean "cosine"?',
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lora_rank", True),
        ("lora_rank", 2.5),
        ("lora_rank", 0),
        ("lora_rank", [1]),
        ("caption_dropout_probability", 1.5),
        ("gradient_checkpointing", "maybe"),
        ("validation_prompt", ["a"]),
        ("output_dir", {"a": 1}),
        ("optimizer_config", 3),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(project: Project, option: str, value: object) -> None:
    project.options(**{option: value})
    assert f"`{option}` is {json.dumps(value)}" in project.problem()


def test_an_unknown_option_gets_the_nearest_name(project: Project) -> None:
    project.options(learning_rat=1)
    assert "Did you mean `learning_rate`?" in project.problem()


def test_an_unknown_option_that_is_near_none_is_no_guess_but_a_refusal(project: Project) -> None:
    project.options(quantum_flux=True)
    assert "this version has no such option" in project.problem()
    assert "Did you mean" not in project.problem()


def test_an_option_of_another_family_says_whose_it_is(project: Project) -> None:
    project.options(other_switch=True)
    assert "belongs to other" in project.problem()


def test_a_stray_word_is_told_without_what_follows_from_it(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    assert "Did you mean --config_file other.json?" in project.problem("other.json")


def test_a_family_in_capitals_is_told_as_it_is_written(project: Project) -> None:
    project.config({"model_family": "Fake"})
    assert 'Did you mean "fake"?' in project.problem()


def test_an_unknown_family_is_told_alone_when_all_else_is_right(project: Project) -> None:
    project.config({"model_family": "fakes", "fake_strength": 2})
    assert 'Did you mean "fake"?' in project.problem()


def test_a_missing_family_is_told(project: Project) -> None:
    project.config({"seed": 1})
    assert "`model_family` is missing" in project.problem()


def test_without_any_configuration_the_mend_names_the_example(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    assert "example=sana-emoji" in project.problem()


def test_a_variable_of_the_shell_is_no_configuration(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    assert "There is no configuration" in project.problem(environ={"SIMPLETUNER_LOG_LEVEL": "DEBUG"})


def test_arguments_alone_are_a_configuration(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    (project.root / "config" / "multidatabackend.json").rename(project.root / "multidatabackend.json")
    run = project.run("model_family=fake", "--seed", "5")
    assert (run.training.seed, run.config_path) == (5, None)


def test_an_unreadable_config_is_told_with_the_command_lines_own_problems(project: Project) -> None:
    project.write("config/config.json", "{")
    problems = project.problems("--seed")
    assert len(problems) == 2
    assert "line 1, column 2" in problems[0]


def test_config_env_is_obeyed_beneath_the_command_line(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    project.write(
        "config/config.env",
        'oops here\nBASE="out"\nexport MODEL_FAMILY=fake\nexport TRAINING_SEED=7\nexport OUTPUT_DIR="${BASE}/x"\n'
        'export TRAINER_EXTRA_ARGS="--lora_rank=4"\nTRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --validation_on_startup"\n',
    )
    run = project.run("--lora_rank", "2")
    assert (run.training.seed, run.checkpointing.output_dir) == (7, "out/x")
    assert (run.adapter.lora_rank, run.validation.validation_on_startup) == (2, True)
    assert run.sources["validation_on_startup"] == "file config/config.env"
    assert any("line 1" in line and "oops here" in line for line in run.notices)
    assert any("deprecated" in line for line in run.notices)


def test_an_open_quote_in_the_extra_arguments_is_told(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    project.write("config/config.env", """MODEL_FAMILY=fake\nTRAINER_EXTRA_ARGS="--validation_prompt 'a cat"\n""")
    assert "No closing quotation" in project.problem()


def test_a_stray_word_in_the_arguments_of_config_env_is_a_problem(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    project.write("config/config.env", 'MODEL_FAMILY=fake\nTRAINER_EXTRA_ARGS="oops"\n')
    assert "`oops` is no option (file config/config.env)" in project.problem()


def test_an_unknown_name_in_config_env_is_a_problem(project: Project) -> None:
    (project.root / "config" / "config.json").unlink()
    project.write("config/config.env", "MODEL_FAMILY=fake\nLERNING_RATE=1\n")
    assert "`LERNING_RATE`" in project.problem()


def test_an_input_is_looked_for_from_the_working_directory_then_beside_the_config(project: Project) -> None:
    project.write("config/prompts.json", "{}")
    project.options(validation_prompt_library="prompts.json")
    assert project.run().validation.validation_prompt_library == "config/prompts.json"
    project.write("prompts.json", "{}")
    assert project.run().validation.validation_prompt_library == "prompts.json"


@pytest.mark.parametrize(("written", "read"), [(True, True), ("true", True), ("false", False), (None, None)])
def test_a_prompt_library_may_also_be_the_bundled_one(project: Project, written: Any, read: bool | None) -> None:
    project.options(validation_prompt_library=written)
    assert project.run().validation.validation_prompt_library is read


def test_an_epoch_interval_stands_in_for_the_steps_that_follow_the_checkpoints(project: Project) -> None:
    project.options(checkpoint_step_interval=50)
    assert project.run().validation.validation_step_interval == 50
    project.options(checkpoint_step_interval=50, validation_epoch_interval=0.5)
    assert project.run().validation.validation_step_interval == 0
    project.options(validation_step_interval=7, validation_epoch_interval=0.5)
    assert project.run().validation.validation_step_interval == 7


def test_a_model_is_a_folder_or_a_hub_name_but_no_missing_path(project: Project) -> None:
    for name in ("owner/model", "model"):
        project.options(pretrained_model_name_or_path=name)
        assert project.run().model.pretrained_model_name_or_path == name
    for name in ("./model", "/nowhere/model", "models/sana/mine", "~/nowhere-at-all"):
        project.options(pretrained_model_name_or_path=name)
        assert "does not exist" in project.problem()
    (project.root / "config" / "model").mkdir()
    project.options(pretrained_model_name_or_path="./model")
    assert project.run().model.pretrained_model_name_or_path == "config/model"


def test_an_overridable_problem_becomes_a_notice_when_the_user_insists(project: Project) -> None:
    project.options(fake_strength=9)
    assert "Too strong" in project.problem()
    project.options(fake_strength=9, i_know_what_i_am_doing=True)
    assert any("Too strong" in line for line in project.run().notices)


def test_what_the_family_has_to_say_is_told(project: Project) -> None:
    assert "That is strong." in project.run("fake_strength=5").notices


def test_a_problem_that_is_not_overridable_stays_one(project: Project) -> None:
    project.options(i_know_what_i_am_doing=True, flow_use_uniform_schedule=True, flow_use_beta_schedule=True)
    assert "both true" in project.problem()


def test_the_machine_decides_what_is_unset(project: Project) -> None:
    assert project.run(hardware=Hardware("cuda", has_bf16=True)).precision.mixed_precision == "bf16"
    assert project.run(hardware=Hardware("cpu")).precision.mixed_precision == "no"


def test_a_path_with_a_null_character_is_no_path(project: Project) -> None:
    assert "no path holds" in project.problem("--data_backend_config=~\0")
