from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.datasets import ImageDataset
from simpletuner.config.options import Option, options_of
from simpletuner.config.sections import SECTIONS
from simpletuner.config.spelling import (
    MissingVariableError,
    canonical_key,
    canonical_value,
    expand,
    is_size_list,
    nearest,
    read_value,
    relaxed_json,
    uses_environment,
)

OPTIONS: dict[str, Option] = {
    option.name: option
    for name, section in {**SECTIONS, "dataset": ImageDataset}.items()
    for option in options_of(name, section)
}


@pytest.mark.parametrize("written", ["learning_rate", "--learning_rate", "--learning-rate", "learning-rate", "LEARNING_RATE"])
def test_a_key_may_have_leading_dashes_inner_dashes_and_capitals(written: str) -> None:
    assert canonical_key(written) == "learning_rate"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("MODEL_NAME", "pretrained_model_name_or_path"),
        ("LR_SCHEDULE", "lr_scheduler"),
        ("MAX_NUM_STEPS", "max_train_steps"),
        ("NUM_EPOCHS", "num_train_epochs"),
        ("CHECKPOINTING_STEPS", "checkpoint_step_interval"),
        ("CHECKPOINTING_LIMIT", "checkpoints_total_limit"),
        ("DATALOADER_CONFIG", "data_backend_config"),
        ("TRAINING_SEED", "seed"),
        ("TRAINING_DYNAMO_BACKEND", "dynamo_backend"),
        ("RESUME_CHECKPOINT", "resume_from_checkpoint"),
        ("USE_GRADIENT_CHECKPOINTING", "gradient_checkpointing"),
        ("VALIDATION_STEPS", "validation_step_interval"),
    ],
)
def test_the_irregular_capitals_of_config_env_name_declared_options(written: str, name: str) -> None:
    assert canonical_key(written) == name
    assert name in OPTIONS


def test_an_irregular_name_in_small_letters_means_nothing() -> None:
    assert canonical_key("model_name") == "model_name"


@pytest.mark.parametrize(
    ("option", "written", "value"),
    [
        ("gradient_checkpointing", "false", False),
        ("gradient_checkpointing", "True", True),
        ("gradient_checkpointing", "off", False),
        ("learning_rate", "1e-5", 1e-5),
        ("max_train_steps", "2000", 2000),
        ("max_train_steps", "2e3", 2000),
        ("crop_aspect_buckets", "[0.5, 1.0]", [0.5, 1.0]),
        ("crop_aspect_buckets", "0.5, 1.0", ["0.5", "1.0"]),
        ("crop_aspect_buckets", '{"0.5": 1, "1": 3}', {"0.5": 1, "1": 3}),
        ("crop_aspect_buckets", [{"aspect": 0.5, "weight": 1}, {"aspect": 1, "weight": 3}], {0.5: 1, 1: 3}),
        (
            "bucket_resolutions",
            ["1024x768", [512, 640], {"width": 8, "height": 9}, 64],
            [[1024, 768], [512, 640], [8, 9], [64, 64]],
        ),
        ("bucket_resolutions", "1024x768, 512X512", [[1024, 768], [512, 512]]),
        ("bucket_resolutions", '["1024x768", 512]', [[1024, 768], [512, 512]]),
        ("caption_shuffle", "true", True),
        ("caption_shuffle", "count=3,split_on=space", {"count": 3, "split_on": "space"}),
        ("resolution", "1024x768", [1024, 768]),
        ("resolution", "1024 × 768", [1024, 768]),
        ("resolution", "512", 512),
        ("resolution", "0.5", 0.5),
        ("optimizer_config", "eps=1e-6,betas=0.9,0.99", {"eps": 1e-6, "betas": [0.9, 0.99]}),
        ("optimizer_config", "betas=(0.9, 0.99),eps=1e-6", {"eps": 1e-6, "betas": [0.9, 0.99]}),
        ("optimizer_config", "betas=[0.9,0.99]", {"betas": [0.9, 0.99]}),
        ("optimizer_config", '{"eps": 1e-6,}', {"eps": 1e-6}),
        ("validation_resolution", 1024, "1024"),
        ("validation_prompt", "1,2", "1,2"),
        ("mixed_precision", "no", "no"),
        ("mixed_precision", "BF16", "bf16"),
        ("log_level", "INFO", "info"),
        ("caption_strategy", "instance_prompt", "instanceprompt"),
        ("data_backend_config", "config/a,b.json", "config/a,b.json"),
    ],
)
def test_a_value_is_read_as_its_option_wants_it(option: str, written: object, value: object) -> None:
    assert read_value(OPTIONS[option], written) == value


@pytest.mark.parametrize("written", ["nan", "inf", "1e999", "seven", "0x10"])
def test_what_is_no_finite_number_is_left_for_the_type_to_refuse(written: str) -> None:
    value = read_value(OPTIONS["learning_rate"], written)
    with pytest.raises(ValueError, match="learning_rate"):
        OPTIONS["learning_rate"].typed(value)


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_every_number_survives_being_written_as_text(number: float) -> None:
    option = OPTIONS["learning_rate"]
    assert option.typed(read_value(option, repr(number))) == number


def test_num_repeats_counts_all_passes() -> None:
    assert canonical_value("num_repeats", 3) == 2
    assert canonical_value("num_repeats", "3") == 2
    assert canonical_value("repeats", 3) == 3


def test_a_variable_is_expanded_wherever_it_stands() -> None:
    written = {"a": ["{env:HOME_DIR}/x", 3], "b": "{env:HOME_DIR}{env:EMPTY}"}
    assert expand(written, {"HOME_DIR": "/h", "EMPTY": ""}) == {"a": ["/h/x", 3], "b": "/h"}
    assert uses_environment(written)
    assert not uses_environment({"a": "{HOME}"})


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(MissingVariableError, match="NOT_THERE"):
        expand("{env:NOT_THERE}", {})


def test_json_may_hold_comments_and_trailing_commas() -> None:
    text = """{
      // a comment, with "quotes" and // slashes
      "url": "https://a//b", "list": [1, 2, ], // after
      "text": "a, }",
    }"""
    assert json.loads(relaxed_json(text)) == {"url": "https://a//b", "list": [1, 2], "text": "a, }"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_plain_json_is_not_changed_by_relaxing_it(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert relaxed_json(text) == text


@given(json_values)
def test_relaxing_keeps_every_line_and_column(value: object) -> None:
    text = json.dumps(value, indent=1) + " // the end"
    relaxed = relaxed_json(text)
    assert [len(line) for line in relaxed.splitlines()] == [len(line) for line in text.splitlines()]


def test_a_mistyped_name_finds_the_nearest() -> None:
    assert nearest("lerning_rate", OPTIONS) == "learning_rate"
    assert nearest("sana1.5", ["sana1.0-600m", "sana1.5-1.6b"]) == "sana1.5-1.6b"
    assert nearest("qwertyuiop", OPTIONS) is None
    assert nearest("ADAMW_BF16", ["adamw_bf16", "came"]) == "adamw_bf16"
    assert nearest("attention", ["Linear", "Attention"]) == "Attention"
    assert nearest("stableadamw", ["optimi-stableadamw", "torch-adamw"]) == "optimi-stableadamw"


@pytest.mark.parametrize("text", ["1024", "1024x768", "1024x1024, 1280x768"])
def test_sizes_by_comma_are_recognised(text: str) -> None:
    assert is_size_list(text)


@pytest.mark.parametrize("text", ["big", "1024x", "0x512", "1024;768", ""])
def test_what_is_no_size_is_not(text: str) -> None:
    assert not is_size_list(text)
