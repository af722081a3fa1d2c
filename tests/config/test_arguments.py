from __future__ import annotations

import pytest

from simpletuner.config.arguments import example_of, read_arguments
from simpletuner.config.vocabulary import Vocabulary
from simpletuner.errors import UserError

VOCABULARY = Vocabulary.of({})


def pairs(*argv: str) -> list[tuple[str, object]]:
    arguments = read_arguments(argv, VOCABULARY)
    assert not arguments.problems
    return [(item.key.lstrip("-"), item.value) for item in arguments.items]


def test_a_value_may_follow_a_blank_or_an_equals_sign() -> None:
    assert pairs("--seed", "3", "--seed=4", "seed=5") == [("seed", "3"), ("seed", "4"), ("seed", "5")]


def test_a_lone_switch_is_true() -> None:
    assert pairs("--validation_on_startup", "--seed", "3") == [("validation_on_startup", "true"), ("seed", "3")]
    assert pairs("--disable-benchmark") == [("disable-benchmark", "true")]


def test_a_switch_takes_a_following_truth_and_nothing_else() -> None:
    assert pairs("--validation_on_startup", "false") == [("validation_on_startup", "false")]
    assert pairs("--validation_on_startup", "seed=3") == [("validation_on_startup", "true"), ("seed", "3")]


def test_a_value_may_hold_equals_signs_and_blanks_and_begin_with_a_minus() -> None:
    assert pairs("--validation_prompt", "a = b", "--optimizer_config=eps=1e-6,weight_decay=0") == [
        ("validation_prompt", "a = b"),
        ("optimizer_config", "eps=1e-6,weight_decay=0"),
    ]
    assert pairs("--seed", "-1") == [("seed", "-1")]


def test_an_option_without_its_value_is_a_problem() -> None:
    [problem] = read_arguments(["--seed", "--lora_rank", "4"], VOCABULARY).problems
    assert "`--seed` has no value" in problem.what
    assert "whole number" in problem.why


def test_a_stray_word_is_a_problem() -> None:
    [problem] = read_arguments(["seed", "--seed", "3"], VOCABULARY).problems
    assert "`seed`" in problem.what


def test_a_stray_config_file_gets_its_mend() -> None:
    [problem] = read_arguments(["my.json"], VOCABULARY).problems
    assert "--config_file my.json" in problem.mend


def test_words_that_say_where_the_options_are_are_no_options() -> None:
    arguments = read_arguments(["--config_file", "a.json", "env=x"], VOCABULARY)
    assert arguments.launch == {"config_file": "a.json", "env": "x"}
    assert not arguments.items


@pytest.mark.parametrize("argv", [["example=emoji", "seed=3"], ["--example", "emoji", "seed=3"], ["--example=emoji", "seed=3"]])
def test_an_example_is_found_in_any_spelling(argv: list[str]) -> None:
    assert example_of(argv) == ("emoji", ["seed=3"])


@pytest.mark.parametrize("other", [["--config_file", "mine.json"], ["config-file=mine.json"], ["env=mine"]])
def test_an_example_beside_another_config_is_refused(other: list[str]) -> None:
    with pytest.raises(UserError, match="each name a config"):
        example_of(["example=emoji", *other])


def test_without_an_example_the_words_stay() -> None:
    assert example_of(["seed=3"]) == (None, ["seed=3"])
