"""Captions from names, from files and from the entry."""

from __future__ import annotations

import codecs
import unicodedata
from typing import Any

import pytest

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.captions import captions_of, decode, has_caption


def captions(file: str = "a_b.jpg", text: str = "", **keys: Any) -> tuple[str, ...]:
    return captions_of(ImageDataset(id="cats", instance_data_dir="cats", **keys), file, text)


@pytest.mark.parametrize(
    ("file", "caption"),
    [
        ("a_red_fox.jpg", "a red fox"),
        ("animals/two words.v2.png", "two words.v2"),
        ("été/chat_noir.webp", "chat noir"),
        ("_x_.jpg", "x"),
    ],
)
def test_a_name_captions_its_picture(file, caption):
    assert captions(file) == (caption,)


def test_a_name_without_words_is_no_caption():
    assert captions("animals/__.jpg") == ()


def test_accents_of_a_name_are_composed():
    assert captions(unicodedata.normalize("NFD", "café.jpg")) == ("café",)


def test_a_name_that_is_no_unicode_still_gives_text_that_can_be_encoded():
    (caption,) = captions(b"caf\xe9_noir.jpg".decode("utf-8", "surrogateescape"))
    assert caption.encode("utf-8").decode().endswith(" noir")


def test_each_line_of_a_text_is_an_alternative():
    assert captions(text=" a fox \n\n  the fox\n", caption_strategy="textfile") == ("a fox", "the fox")


def test_lines_stay_together_when_splitting_is_off():
    assert captions(text="a fox\nthe fox\n", caption_strategy="textfile", disable_multiline_split=True) == ("a fox\nthe fox",)


@pytest.mark.parametrize("text", ["", " \n\t\n"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_text_without_words_is_no_caption(text, joined):
    assert captions(text=text, caption_strategy="textfile", disable_multiline_split=joined) == ()


def test_the_instance_prompt_captions_every_picture():
    assert captions(caption_strategy="instanceprompt", instance_prompt="a sks cat") == ("a sks cat",)


def test_a_missing_caption_may_be_the_instance_prompt():
    keys = {"caption_strategy": "textfile", "instance_prompt": "a sks cat"}
    assert captions(caption_missing="instance_prompt", **keys) == ("a sks cat",)
    assert captions(caption_missing="error", **keys) == ()
    assert captions(text="a fox", caption_missing="instance_prompt", **keys) == ("a fox",)


def test_the_instance_prompt_may_begin_every_caption():
    keys = {"prepend_instance_prompt": True, "instance_prompt": " a sks cat, "}
    assert captions("on_a_roof.jpg", **keys) == ("a sks cat, on a roof",)
    assert captions(text="on a roof\nasleep", caption_strategy="textfile", **keys) == (
        "a sks cat, on a roof",
        "a sks cat, asleep",
    )
    assert captions(caption_strategy="textfile", **keys) == ()
    assert captions(caption_strategy="textfile", caption_missing="instance_prompt", **keys) == ("a sks cat,",)
    assert captions(caption_strategy="instanceprompt", **keys) == ("a sks cat,",)


@pytest.mark.parametrize("strategy", ["filename", "textfile", "instanceprompt"])
def test_the_instance_prompt_may_stand_alone_whatever_the_strategy(strategy):
    keys = {"caption_strategy": strategy, "only_instance_prompt": True, "instance_prompt": "a sks cat"}
    assert captions(text="a, b", caption_shuffle=True, prepend_instance_prompt=True, **keys) == ("a sks cat",)


TAGS = "fox, red, snow, night, close-up, film grain"


def shuffled(text: str = TAGS, **settings: Any) -> tuple[str, ...]:
    return captions(text=text, caption_strategy="textfile", caption_shuffle=settings or True)


def test_shuffling_gives_a_variant_beside_the_caption():
    original, variant = shuffled()
    assert original == TAGS
    assert variant != TAGS
    assert sorted(variant.split(", ")) == sorted(TAGS.split(", "))


def test_so_many_variants_are_fixed_for_each_caption_and_seed():
    variants = shuffled(count=40, include_original=False)
    assert len(set(variants)) > 35
    assert variants == shuffled(count=40, include_original=False)
    assert variants[:3] == shuffled(count=3, include_original=False), "more of them keep those that are cached"
    assert variants != shuffled(count=40, include_original=False, seed=1)
    assert variants != shuffled(TAGS + ", dusk", count=40, include_original=False)


def test_first_tags_may_stay_in_front():
    variants = shuffled(count=30, position_start=2, include_original=False)
    assert {tuple(variant.split(", ")[:2]) for variant in variants} == {("fox", "red")}
    assert len({variant.split(", ")[2] for variant in variants}) == 4


@pytest.mark.parametrize(("mark", "text"), [("space", "a b  c d"), ("period", "a. b. c. d"), ("comma", "a,b,,c , d")])
def test_tags_may_be_parted_otherwise(mark, text):
    joint = {"space": " ", "period": ". ", "comma": ", "}[mark]
    [variant] = shuffled(text, split_on=mark, include_original=False)
    assert sorted(variant.split(joint)) == ["a", "b", "c", "d"]


def test_every_line_is_shuffled_for_itself_and_the_instance_prompt_stays_in_front():
    keys = {"caption_strategy": "textfile", "caption_shuffle": True}
    found = captions(text="a, b, c\nd", prepend_instance_prompt=True, instance_prompt="sks", **keys)
    assert [caption.split()[0] for caption in found] == ["sks"] * 4
    assert [sorted(caption.removeprefix("sks ").split(", ")) for caption in found] == [["a", "b", "c"]] * 2 + [["d"]] * 2


def test_shuffling_may_be_switched_off_in_its_object():
    assert shuffled(enable=False, count=3) == (TAGS,)
    assert captions("a, b.jpg", caption_shuffle=False) == ("a, b",)


def test_variants_are_the_same_on_every_machine_and_for_all_time():
    """A change here encodes every shuffled caption afresh."""
    assert shuffled("a, b, c, d, e", include_original=False) == ("c, a, b, e, d",)


@pytest.mark.parametrize("text", ["", "a fox"])
@pytest.mark.parametrize("missing", ["error", "instance_prompt"])
@pytest.mark.parametrize("strategy", ["filename", "textfile", "instanceprompt"])
def test_there_is_a_caption_just_where_captions_are_found(text, missing, strategy):
    entry = ImageDataset(
        id="cats",
        instance_data_dir="cats",
        caption_strategy=strategy,
        caption_missing=missing,
        caption_shuffle=True,
        instance_prompt="a cat" if missing == "instance_prompt" else None,
    )
    for file in ("a_b.jpg", "__.jpg"):
        assert has_caption(entry, file, text) == bool(captions_of(entry, file, text))


@pytest.mark.parametrize(
    "raw",
    [
        "ein Fuchs\nzwei Füchse".encode(),
        codecs.BOM_UTF8 + "ein Fuchs\r\nzwei Füchse".encode(),
        "ein Fuchs\rzwei Füchse".encode(),
        "ein Fuchs\nzwei Füchse".encode("utf-16"),
        codecs.BOM_UTF16_BE + "ein Fuchs\r\nzwei Füchse".encode("utf-16-be"),
    ],
)
def test_texts_are_read_with_marks_and_line_ends_of_any_system(raw):
    assert decode(raw) == "ein Fuchs\nzwei Füchse"


@pytest.mark.parametrize("raw", ["zwei Füchse".encode("latin-1"), "a fox".encode("utf-16-le"), b"\xff\xfea"])
def test_what_is_no_utf8_is_not_guessed_at(raw):
    assert decode(raw) is None
