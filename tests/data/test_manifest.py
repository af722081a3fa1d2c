"""Columns in memory and on disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from simpletuner.data import manifest as module
from simpletuner.data.manifest import Manifest, Remembered, Texts, load_manifest, save_manifest

NOT_UTF8 = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")


def example(files: tuple[str, ...] = ("a.jpg", "ü/b c.png", NOT_UTF8)) -> Manifest:
    count = len(files)
    numbers = np.arange(count, dtype=np.int64)
    edges = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    texts = Texts.of("line\nline" if n % 2 else "" for n in range(count))
    return Manifest("/pics", "textfile", Texts.of(files), numbers + 10, numbers + 2**60, edges, numbers - 1, numbers, texts)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6)))
def test_a_column_of_texts_gives_back_what_it_was_given(strings):
    texts = Texts.of(strings)
    assert texts.strings() == strings
    assert [texts.at(row) for row in range(len(strings))] == strings


@pytest.mark.parametrize("files", [(), ("a.jpg",), ("a.jpg", "ü/b c.png", NOT_UTF8)])
def test_a_manifest_survives_the_disk(tmp_path, files):
    saved = example(files)
    if files:
        saved.remember(0, Remembered(b"\0digest\0", "key", "recipe"))
        saved.faults[len(files) - 1] = ("damaged", "Stück fehlt")
    save_manifest(saved, tmp_path / "cache" / "m.safetensors")
    loaded = load_manifest(tmp_path / "cache" / "m.safetensors")
    assert loaded is not None
    assert (loaded.root, loaded.captions_from, loaded.faults) == ("/pics", "textfile", saved.faults)
    assert loaded.files.strings() == list(files)
    assert loaded.captions.strings() == saved.captions.strings()
    for name in (*module.NUMBERS, *module.WORDS):
        old, new = getattr(saved, name), getattr(loaded, name)
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        assert np.array_equal(old, new)


def test_what_was_learned_is_given_back():
    manifest = example()
    learned = Remembered(bytes(16), "k" * 32, "r" * 16)
    assert manifest.remembered(1) is None
    manifest.remember(1, learned)
    assert manifest.remembered(1) == learned
    assert manifest.is_current.tolist() == [False, True, False]


def test_a_word_too_long_for_its_column_is_not_cut_short():
    with pytest.raises(AssertionError):
        example().remember(0, Remembered(b"digest", "k" * 65, "recipe"))


def test_what_was_loaded_can_be_added_to(tmp_path):
    save_manifest(example(), tmp_path / "m")
    loaded = load_manifest(tmp_path / "m")
    assert loaded is not None
    loaded.remember(2, Remembered(b"digest", "key", "recipe"))
    assert loaded.remembered(2) == Remembered(b"digest", "key", "recipe")


def test_a_sample_costs_a_few_hundred_bytes(tmp_path):
    save_manifest(example(tuple(f"folder/picture_{n}.jpg" for n in range(2000))), tmp_path / "m")
    assert (tmp_path / "m").stat().st_size / 2000 < 300


def test_no_manifest_or_another_versions_is_none(tmp_path, monkeypatch):
    assert load_manifest(tmp_path / "m") is None
    save_manifest(example(), tmp_path / "m")
    monkeypatch.setattr(module, "VERSION", "0")
    assert load_manifest(tmp_path / "m") is None


def test_a_damaged_manifest_says_so(tmp_path):
    save_manifest(example(), tmp_path / "m")
    raw = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SafetensorError):
        load_manifest(tmp_path / "m")
