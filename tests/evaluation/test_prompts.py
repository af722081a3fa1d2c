from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.config.run import Run
from simpletuner.data.samples import Prompt
from simpletuner.errors import ConfigError
from simpletuner.evaluation.prompts import prompts_of, validation_shots
from simpletuner.events import Event, Notice
from simpletuner.families.base import Shot

Shots = Callable[..., tuple[Shot, ...]]


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def shots(make_run: Callable[..., Run], told: list[Event]) -> Shots:
    def of(**options: object) -> tuple[Shot, ...]:
        run = make_run("sana", validation_seed=7, **options)
        return validation_shots(run, defaults=(4.5, 20), native_edge_px=128, alignment_px=32, tell=told.append)

    return of


@pytest.fixture
def library(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "library.json"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def texts(told: list[Event]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, Notice))


def test_the_main_prompt_comes_first_and_the_library_follows_in_its_order(shots: Shots, library: Callable[[str], str]) -> None:
    made = shots(validation_prompt="a cat", validation_prompt_library=library('{"z": "a dog", "a": "a fox"}'))
    assert [(shot.index, shot.nickname, shot.prompt) for shot in made] == [
        (0, "validation", "a cat"),
        (1, "z", "a dog"),
        (2, "a", "a fox"),
    ]


def test_a_shot_has_the_family_s_guidance_steps_and_size_where_nothing_is_written(shots: Shots) -> None:
    (shot,) = shots(validation_prompt="a cat")
    assert (shot.guidance, shot.steps, shot.width_px, shot.height_px, shot.seed, shot.negative) == (4.5, 20, 128, 128, 7, "")


def test_what_is_written_wins_even_where_it_is_nought(shots: Shots) -> None:
    (shot,) = shots(
        validation_prompt="a cat",
        validation_guidance=0.0,
        validation_num_inference_steps=3,
        validation_negative_prompt="blurry",
        validation_resolution="256x128",
    )
    assert (shot.guidance, shot.steps, shot.width_px, shot.height_px, shot.negative) == (0.0, 3, 256, 128, "blurry")


def test_every_prompt_is_rendered_at_every_size(shots: Shots, library: Callable[[str], str]) -> None:
    made = shots(
        validation_prompt="a", validation_prompt_library=library('{"b": "b"}'), validation_resolution="128x128, 96X64,160"
    )
    sizes = [(128, 128), (96, 64), (160, 160)]
    assert [(shot.index, shot.width_px, shot.height_px) for shot in made] == [(i, *size) for i in (0, 1) for size in sizes]


def test_a_size_off_the_alignment_is_rounded_once_and_said(shots: Shots, told: list[Event]) -> None:
    made = shots(validation_prompt="a", validation_resolution="100x130,96x128,5x5")
    assert [(shot.width_px, shot.height_px) for shot in made] == [(96, 128), (32, 32)]
    assert "100x130 is rendered at 96x128" in texts(told)
    assert "5x5 is rendered at 32x32" in texts(told)


def test_a_library_may_hold_comments_and_a_trailing_comma(shots: Shots, library: Callable[[str], str]) -> None:
    made = shots(validation_prompt_library=library('{\n  // mine\n  "cat": "a cat",\n}'))
    assert [(shot.index, shot.nickname) for shot in made] == [(0, "cat")]


@pytest.mark.parametrize(
    ("content", "said"), [('{"a": ', "line 1"), ('["a"]', "not an object"), ('{"a": 3, "b": null}', "`b` has no text but None")]
)
def test_an_unreadable_library_is_an_error(shots: Shots, library: Callable[[str], str], content: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shots(validation_prompt_library=library(content))


def test_an_entry_may_say_how_much_the_adapter_counts(shots: Shots, library: Callable[[str], str]) -> None:
    text = '{"plain": "a cat", "half": {"prompt": "a dog", "adapter_strength": 0.5}, "object": {"prompt": "a fox"}}'
    made = shots(validation_prompt="a", validation_prompt_library=library(text))
    assert [(shot.prompt, shot.adapter_strength) for shot in made] == [("a", 1), ("a cat", 1), ("a dog", 0.5), ("a fox", 1)]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"adapter_strength": 1}, "has no text"),
        ({"prompt": "a", "adapter_strength": "much"}, "`adapter_strength` 'much'"),
        ({"prompt": "a", "adapter_strength": True}, "`adapter_strength` True"),
        ({"prompt": "a", "strength": 1}, "unknown key 'strength'"),
    ],
)
def test_an_entry_that_is_not_understood_is_an_error(
    shots: Shots, library: Callable[[str], str], entry: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        shots(validation_prompt_library=library(json.dumps({"cat": entry})))


def test_full_tuning_has_no_adapter_whose_strength_could_be_set(shots: Shots, library: Callable[[str], str]) -> None:
    text = '{"half": {"prompt": "a dog", "adapter_strength": 0.5}}'
    with pytest.raises(ConfigError, match=r"model_type is full.*\n.*no adapter"):
        shots(validation_prompt_library=library(text), model_type="full")
    assert shots(validation_prompt_library=library('{"whole": {"prompt": "a", "adapter_strength": 1}}'), model_type="full")


def test_true_is_the_bundled_library_and_false_is_none(shots: Shots) -> None:
    made = shots(validation_prompt_library=True)
    assert {"portrait", "hands", "text"} <= {shot.nickname for shot in made}
    assert len({shot.prompt for shot in made}) == len(made) >= 12
    assert shots(validation_prompt_library=False) == ()


def test_half_a_character_in_a_prompt_does_not_reach_the_tokenizer(shots: Shots, library: Callable[[str], str]) -> None:
    (shot,) = shots(validation_prompt_library=library('{"half \\ud83d": "a \\ud83d cat"}'))
    assert (shot.nickname, shot.prompt) == ("half ?", "a ? cat")


def test_a_library_that_is_not_there_is_an_error_that_names_it(shots: Shots) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        shots(validation_prompt_library="nowhere.json")


def test_a_token_left_in_a_prompt_is_told_by_nickname(shots: Shots, library: Callable[[str], str], told: list[Event]) -> None:
    text = json.dumps({"chef_<token>": "<token> as a chef", "fine": "a cat"})
    shots(validation_prompt="a photo of <token>", validation_prompt_library=library(text))
    (warning,) = (event for event in told if isinstance(event, Notice) and event.level == "warning")
    assert "validation, chef_<token>" in warning.text
    assert "fine" not in warning.text


def test_what_will_be_rendered_is_said_and_so_is_nothing(shots: Shots, told: list[Event]) -> None:
    shots(validation_prompt="a cat")
    assert "1 prompt at 128x128: validation" in texts(told)
    told.clear()
    assert shots() == ()
    assert "No gallery" in texts(told)


def test_each_prompt_and_each_negative_is_encoded_once(shots: Shots, library: Callable[[str], str]) -> None:
    made = shots(
        validation_prompt="a cat",
        validation_prompt_library=library('{"same": "a cat", "empty": ""}'),
        validation_resolution="64,128",
    )
    assert prompts_of(made) == [Prompt("a cat"), Prompt("", "uncond"), Prompt("")]
