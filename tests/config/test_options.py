from __future__ import annotations

from collections import Counter

import pytest

from simpletuner.config.datasets import ENTRIES
from simpletuner.config.effects import holds
from simpletuner.config.options import Option, options_of
from simpletuner.config.sections import SECTIONS
from simpletuner.config.vocabulary import Vocabulary
from simpletuner.families import find

CORE = [option for name, section in SECTIONS.items() for option in options_of(name, section)]
ALL = [*CORE, *(option for part in ENTRIES.values() for option in options_of("dataset", part))]
WANTS = {option.name: option.wants for option in ALL}


def test_no_two_core_options_share_a_name() -> None:
    names = Counter(name for option in CORE for name in (option.name, *option.also))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_dataset_key_that_may_stand_in_the_main_config_is_also_an_option() -> None:
    vocabulary = Vocabulary.of(find())
    assert [name for name in vocabulary.core if vocabulary.is_dataset_default(name)] == []


def test_every_default_of_a_family_is_an_option() -> None:
    for family in find().values():
        assert family.defaults.keys() <= Vocabulary.of({}).in_main()


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.name)
def test_every_option_has_help_and_a_condition_on_options_that_exist(option: Option) -> None:
    assert option.help.endswith(".")
    siblings = {other.name: "" for other in (CORE if option in CORE else ALL)}
    holds(option.when, siblings)  # a KeyError names what does not exist


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_rank", "whole number, at least 1"),
        ("caption_dropout_probability", "number, at least 0 and at most 1"),
        ("mixed_precision", "one of no, bf16, fp16"),
        ("gradient_checkpointing", "true or false"),
        ("resolution", 'number, above 0, or size such as "1024x768"'),
        ("crop_aspect_buckets", "list (number, above 0 each), or object"),
        ("bucket_resolutions", 'list (size such as "1024x768" each)'),
        (
            "caption_shuffle",
            "true or false, or object (enable, count, seed, split_on, position_start, include_original)",
        ),
        ("optimizer_config", 'object, or "key=value,key=value"'),
    ],
)
def test_what_an_option_takes_is_said_in_words(name: str, words: str) -> None:
    assert WANTS[name] == words


def test_each_option_can_be_typed_alone_though_its_section_has_required_ones() -> None:
    repeats = next(option for option in ALL if option.name == "repeats")
    assert repeats.typed("3") == 3
