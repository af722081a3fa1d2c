from __future__ import annotations

from simpletuner.config.envfile import read_env

# As the SD3 page prints it, its stray first line included.
SD3_PAGE = """\
</details>

# choices: int8-quanto, int4-quanto, int2-quanto, fp8-quanto
# may the gods have mercy on your soul, should you push things Too Far.
export TRAINER_EXTRA_ARGS="--base_model_precision=int8-quanto"

# Alternatively, you can go ham on quantisation here.
export TRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --text_encoder_1_precision=no_change --text_encoder_2_precision=no_change"

export OPTIMIZER="adamw_bf16"
"""


def test_the_sd3_pages_block_is_read_as_a_shell_would() -> None:
    content = read_env(SD3_PAGE, {})
    assert dict(content.values) == {"OPTIMIZER": "adamw_bf16"}
    assert content.arguments == (
        "--base_model_precision=int8-quanto",
        "--text_encoder_1_precision=no_change",
        "--text_encoder_2_precision=no_change",
    )


def test_a_line_that_is_no_assignment_is_named_with_its_number() -> None:
    assert read_env(SD3_PAGE, {}).skipped == ((1, "</details>"),)
    assert [line for line, _ in read_env("A=1\nif true; then\nB=2 rm -rf /\n", {}).skipped] == [2, 3]


def test_references_see_earlier_lines_and_the_environment() -> None:
    content = read_env('BASE=/data\nOUTPUT_DIR="$BASE/${NAME}/x"\nOTHER=$MISSING.', {"NAME": "me"})
    assert content.values["OUTPUT_DIR"] == "/data/me/x"
    assert content.values["OTHER"] == "."
    assert {"BASE", "NAME"} <= content.helpers


def test_single_quotes_keep_the_dollar() -> None:
    assert read_env("VALIDATION_PROMPT='costs $5'", {}).values["VALIDATION_PROMPT"] == "costs $5"


def test_quotes_spaces_comments_and_continued_lines_are_as_in_a_shell() -> None:
    text = 'A=\'x y\'"z" # why\nexport B=1;\nC="one \\\ntwo"\nD=a#b\nE=\nF="two\nlines"\n'
    assert dict(read_env(text, {}).values) == {"A": "x yz", "B": "1", "C": "one two", "D": "a#b", "E": "", "F": "two\nlines"}


def test_extra_arguments_may_hold_quoted_spaces() -> None:
    assert read_env("""TRAINER_EXTRA_ARGS="--validation_prompt='a photo' --seed 3" """, {}).arguments == (
        "--validation_prompt=a photo",
        "--seed",
        "3",
    )
