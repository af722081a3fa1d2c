"""Captions from names, from files and from the entry."""

from __future__ import annotations

import codecs
import unicodedata
from typing import Any

import pytest

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.captions import captions_of, decode


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
