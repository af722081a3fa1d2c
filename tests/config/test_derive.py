from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.derive import derive_image, dtypes
from simpletuner.config.run import Dtypes, Hardware

Project = Any
GPU = Hardware("cuda", has_bf16=True)


def test_a_card_with_bf16_trains_in_it(project: Project) -> None:
    run = project.run(hardware=GPU)
    assert (run.precision.mixed_precision, run.optimizer.optimizer) == ("bf16", "adamw_bf16")


def test_a_machine_without_bf16_does_not_and_says_so(project: Project) -> None:
    run = project.run(hardware=Hardware("mps"))
    assert (run.precision.mixed_precision, run.optimizer.optimizer) == ("no", "torch-adamw")
    assert any("(mps) has no fast bf16" in line for line in run.notices)


def test_bf16_as_written_is_obeyed_anywhere_with_a_notice(project: Project) -> None:
    run = project.run("mixed_precision=bf16", hardware=Hardware("cpu"))
    assert run.precision.mixed_precision == "bf16"
    assert run.dtypes.base == "bfloat16"
    assert any("as asked" in line for line in run.notices)


@pytest.mark.parametrize(("model_type", "rate"), [("lora", 1e-4), ("full", 1e-5)])
def test_the_learning_rate_follows_what_is_trained(project: Project, model_type: str, rate: float) -> None:
    assert project.run(f"model_type={model_type}").optimizer.learning_rate == rate


@pytest.mark.parametrize(
    ("optimizer", "model_type", "rate"),
    [
        ("optimi-lion", "lora", 2e-5),
        ("bnb-lion8bit-paged", "lora", 2e-5),
        ("bnb-lion", "full", 2e-6),
        ("prodigy", "lora", 1.0),
        ("prodigy", "full", 1.0),
        ("came", "full", 1e-5),
    ],
)
def test_the_learning_rate_follows_the_optimiser(project: Project, optimizer: str, model_type: str, rate: float) -> None:
    assert project.run(f"model_type={model_type}", f"optimizer={optimizer}").optimizer.learning_rate == rate
    assert project.run(f"optimizer={optimizer}", "learning_rate=0.3").optimizer.learning_rate == 0.3


def test_state_that_is_not_paged_without_cuda_is_said(project: Project) -> None:
    for hardware, said in ((Hardware("cpu"), True), (GPU, False)):
        notices = project.run("optimizer=bnb-lion8bit-paged", hardware=hardware).notices
        assert any("(cpu) it is bnb-lion8bit, with the same numbers" in line for line in notices) is said
    assert not any("pages" in line for line in project.run("optimizer=bnb-lion8bit").notices)


def test_a_falling_rate_beside_averaged_weights_is_said(project: Project) -> None:
    for schedule, said in (("cosine", True), ("constant", False), ("constant_with_warmup", False)):
        notices = project.run("optimizer=adamw_schedulefree", f"lr_scheduler={schedule}").notices
        assert any("lr_scheduler constant is advised" in line for line in notices) is said


def test_a_small_rate_for_an_optimiser_that_finds_its_own_is_said(project: Project) -> None:
    for rate, said in ((1e-4, True), (0.5, False)):
        notices = project.run("optimizer=prodigy", f"learning_rate={rate}").notices
        assert any("1 is advised, not 0.0001" in line for line in notices) is said


SCHEDULES = ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"]


@pytest.mark.parametrize(("schedule", "steps"), [("constant_with_warmup", 100), *((name, 0) for name in SCHEDULES)])
def test_only_the_default_schedule_warms_up_by_itself(project: Project, schedule: str, steps: int) -> None:
    assert project.run(f"lr_scheduler={schedule}").optimizer.lr_warmup_steps == steps


def test_a_warmup_that_outlasts_the_run_is_told(project: Project) -> None:
    assert any("never used" in line for line in project.run("max_train_steps=50").notices)
    assert not any("never used" in line for line in project.run("max_train_steps=101").notices)


def test_the_length_is_said_where_nobody_set_it(project: Project) -> None:
    run = project.run()
    assert run.training.max_train_steps == 2000
    assert run.sources["max_train_steps"] == "derived"
    assert any("2000 steps" in line for line in run.notices)


def test_a_length_that_was_written_is_not_called_unset_even_if_it_is_the_default(project: Project) -> None:
    assert not any("neither" in line for line in project.run("max_train_steps=2000").notices)


def test_epochs_alone_leave_the_steps_open(project: Project) -> None:
    run = project.run("num_train_epochs=2")
    assert (run.training.max_train_steps, run.training.num_train_epochs) == (0, 2)


def test_with_steps_and_epochs_the_earlier_end_counts_and_is_said(project: Project) -> None:
    assert any("whichever comes first" in line for line in project.run("num_train_epochs=2", "max_train_steps=200").notices)


def test_the_gallery_follows_seed_and_checkpoints(project: Project) -> None:
    run = project.run("seed=9", "checkpoint_step_interval=30")
    assert (run.validation.validation_seed, run.validation.validation_step_interval) == (9, 30)


def test_a_flavour_is_taken_only_where_no_model_is_named(project: Project) -> None:
    assert project.run().model.model_flavour == "small"
    assert project.run("pretrained_model_name_or_path=owner/name").model.model_flavour is None


def test_a_flavour_may_differ_from_its_family_by_name_or_by_repository_and_the_user_still_wins(project: Project) -> None:
    for chosen in ("model_flavour=large", "pretrained_model_name_or_path=maker/large"):
        run = project.run(chosen)
        assert (run.optimizer.max_grad_norm, run.sources["max_grad_norm"]) == (0.7, "flavour")
        assert project.run(chosen, "max_grad_norm=2").optimizer.max_grad_norm == 2


def test_a_path_beside_a_flavour_wins_and_is_said(project: Project) -> None:
    notices = project.run("pretrained_model_name_or_path=owner/name", "model_flavour=large").notices
    assert any("wins over the flavour large" in line for line in notices)


def whole(mixed: str, optimizer: str, model_type: str) -> dict[str, str | None]:
    options = {"mixed_precision": mixed, "optimizer": optimizer, "model_type": model_type}
    return {**options, "base_model_precision": "no_change", "base_model_default_dtype": None}


def quantised(mixed: str, optimizer: str, default: str) -> dict[str, str | None]:
    return whole(mixed, optimizer, "lora") | {"base_model_precision": "int8-quanto", "base_model_default_dtype": default}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (whole("no", "adamw_bf16", "lora"), Dtypes("float32", "float32", None, "float32", "float32")),
        (whole("bf16", "adamw_bf16", "lora"), Dtypes("bfloat16", "bfloat16", None, "bfloat16", "float16")),
        (whole("bf16", "torch-adamw", "lora"), Dtypes("bfloat16", "float32", None, "bfloat16", "float16")),
        (whole("fp16", "torch-adamw", "lora"), Dtypes("float16", "float32", None, "float32", "float16")),
        (whole("bf16", "adamw_bf16", "full"), Dtypes("bfloat16", "bfloat16", None, "bfloat16", "float16")),
        (whole("bf16", "torch-adamw", "full"), Dtypes("float32", "float32", "bfloat16", "bfloat16", "float16")),
        (whole("fp16", "adamw_bf16", "full"), Dtypes("float32", "float32", "float16", "float32", "float16")),
        (whole("bf16", "optimi-lion", "lora"), Dtypes("bfloat16", "bfloat16", None, "bfloat16", "float16")),
        (whole("bf16", "optimi-adamw", "full"), Dtypes("bfloat16", "bfloat16", None, "bfloat16", "float16")),
        (whole("bf16", "ao-adamw8bit", "full"), Dtypes("float32", "float32", "bfloat16", "bfloat16", "float16")),
        (quantised("no", "torch-adamw", "bf16"), Dtypes("bfloat16", "float32", None, "float32", "float32")),
        (quantised("bf16", "adamw_bf16", "fp32"), Dtypes("float32", "bfloat16", None, "bfloat16", "float16")),
    ],
)
def test_number_formats_follow_precision_optimiser_and_model_type(options: dict[str, Any], expected: Dtypes) -> None:
    assert dtypes(options) == expected


@pytest.mark.parametrize(
    ("words", "hardware", "expected"),
    [
        (("mixed_precision=bf16",), GPU, "bf16"),
        (("mixed_precision=fp16",), GPU, "fp16"),
        (("mixed_precision=no",), GPU, "bf16"),
        (("mixed_precision=no",), Hardware("cpu"), "fp32"),
        (("mixed_precision=no", "base_model_default_dtype=fp16"), GPU, "fp16"),
    ],
)
def test_what_stays_whole_of_a_quantised_base_has_the_format_of_the_run(
    project: Project, words: tuple[str, ...], hardware: Hardware, expected: str
) -> None:
    run = project.run("base_model_precision=int8-quanto", *words, hardware=hardware)
    assert run.precision.base_model_default_dtype == expected


def test_a_cache_folder_bears_the_datasets_name_as_far_as_folders_can() -> None:
    assert derive_image({"id": "a/b: c"}, "out") == {"cache_dir_vae": "out/cache/vae/a_b_ c"}
    assert derive_image({"id": ".."}, "out") == {"cache_dir_vae": "out/cache/vae/_"}
    assert derive_image({"id": "猫", "cache_dir_vae": None}, "out") == {"cache_dir_vae": "out/cache/vae/猫"}
    assert derive_image({"id": "a", "cache_dir_vae": "mine"}, "out") == {}
