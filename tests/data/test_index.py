"""Opening a set: what is used, what is left out, and what is said of it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.ledger import Exclusion, Note
from simpletuner.data.manifest import Remembered
from simpletuner.data.pixels import Unreadable
from simpletuner.data.samples import LatentSpec
from simpletuner.data.stores.folder import Folder as FolderStore
from simpletuner.errors import DataError, RunError
from simpletuner.events import Event, Notice, Progress

LATENT = LatentSpec(channels=32, cell_px=32, alignment_px=64, native_edge_px=256)


class Folder:
    """A folder of pictures, opened as often as one likes, and what was told."""

    def __init__(self, path: Path) -> None:
        self.root = path / "pictures"
        self.cache = path / "cache"
        self.root.mkdir()
        self.told: list[Event] = []

    def add(self, name: str, size: tuple[int, int] = (256, 256), text: str | None = None) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.new("RGB", size, (len(name), 0, 0)).save(file, "PNG")
        path.write_bytes(file.getvalue())
        if text is not None:
            path.with_suffix(".txt").write_text(text, encoding="utf-8")
        return path

    def entry(self, **keys: Any) -> ImageDataset:
        return ImageDataset(**{"id": "cats", "instance_data_dir": str(self.root), "cache_dir_vae": str(self.cache)} | keys)

    def open(self, **keys: Any) -> ImageSet:
        return open_dataset(self.entry(**keys), LATENT, tell=self.told.append)

    def refused(self, **keys: Any) -> DataError:
        with pytest.raises(DataError) as caught:
            self.open(**keys)
        return caught.value

    def notices(self, level: str = "info") -> list[str]:
        return [event.text for event in self.told if isinstance(event, Notice) and event.level == level]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def files(images: ImageSet) -> list[str]:
    return [images.file(sample) for sample in images.alive()]


def test_samples_have_files_captions_places_and_buckets(folder):
    wide, square = folder.add("b_wide.png", (512, 256)), folder.add("a/a_square.png", (300, 300))
    images = folder.open()
    assert len(images) == 2
    assert files(images) == ["a/a_square.png", "b_wide.png"]
    assert [images.captions(sample) for sample in (0, 1)] == [("a square",), ("b wide",)]
    assert images.buckets == ((256, 256), (384, 192))
    assert images.bucket_ids.tolist() == [0, 1]
    assert images.bucket_ids.dtype == np.int32
    assert images.place(1).original_WH == (512, 256)
    assert images.place(1).target_WH == (384, 192)
    assert [images.read(0), images.read(1)] == [square.read_bytes(), wide.read_bytes()]


def test_each_sample_stands_in_the_bucket_of_its_place(folder):
    for n in range(12):
        folder.add(f"{n}.png", (200 + 10 * n, 256))
    for keys in ({}, {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0]}):
        images = folder.open(**keys)
        assert [images.buckets[bucket] for bucket in images.bucket_ids] == [images.place(i).target_WH for i in range(12)]
        assert len(images.buckets) > 1


def test_found_is_used_plus_excluded_each_with_its_reason(folder):
    folder.add("good.png")
    folder.add("small.png", (40, 40))
    folder.add("wide.png", (900, 100))
    (folder.root / "bad.jpg").write_bytes(b"no picture")
    ledger = folder.open(minimum_image_size=128).ledger
    assert (ledger.found, ledger.used) == (4, 1)
    assert [(one.file, one.reason) for one in ledger.excluded] == [
        ("bad.jpg", "not a picture"),
        ("small.png", "below minimum_image_size"),
        ("wide.png", "too wide"),
    ]
    assert ledger.summary.startswith("cats: 4 found = 1 used + 3 excluded (")


def test_a_large_enlargement_is_noted(folder):
    folder.add("double.png", (128, 128))
    folder.add("more.png", (120, 120))
    assert folder.open().ledger.notes == (Note("more.png", "enlarged 2.1 times, from 120x120"),)


def test_a_second_start_opens_no_picture(folder, monkeypatch):
    folder.add("a.png", text="a fox\nthe fox")
    (folder.root / "bad.jpg").write_bytes(b"no picture")
    keys = {"caption_strategy": "textfile"}
    first = folder.open(**keys)

    def forbidden(path: str) -> tuple[int, int]:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(FolderStore, "measure", forbidden)
    second = folder.open(**keys)
    assert second.captions(0) == ("a fox", "the fox")
    assert second.ledger == first.ledger


def test_the_users_folder_is_left_as_it_was(folder):
    folder.add("a.png", text="a fox")
    before = {path: path.stat().st_mtime_ns for path in [folder.root, *folder.root.rglob("*")]}
    folder.open(caption_strategy="textfile").save()
    assert {path: path.stat().st_mtime_ns for path in [folder.root, *folder.root.rglob("*")]} == before


def test_what_was_learned_is_remembered_at_the_next_start(folder):
    folder.add("a.png")
    images = folder.open()
    assert images.remembered(0) is None
    assert images.previous(0) is None
    images.remember(0, b"digest", "key", "recipe")
    images.save()
    assert folder.open().remembered(0) == Remembered(b"digest", "key", "recipe")


def test_what_was_learned_of_a_changed_file_is_only_its_past(folder):
    folder.add("a.png")
    images = folder.open()
    images.remember(0, b"digest", "key", "recipe")
    images.save()
    folder.add("a.png", (300, 256))
    images = folder.open()
    assert images.remembered(0) is None
    assert images.previous(0) == Remembered(b"digest", "key", "recipe")
    images.remember(0, b"new", "key2", "recipe")
    assert images.remembered(0) == images.previous(0) == Remembered(b"new", "key2", "recipe")


def test_an_excluded_sample_keeps_its_number_and_stays_out(folder):
    for name in ("a.png", "b.png", "c.png"):
        folder.add(name)
    images = folder.open()
    images.exclude(1, "damaged", "truncated")
    assert images.alive().tolist() == [0, 2]
    assert images.file(2) == "c.png"
    assert images.ledger.excluded == (Exclusion("b.png", "damaged", "truncated"),)
    images.save()
    again = folder.open()
    assert files(again) == ["a.png", "c.png"]
    assert again.ledger == images.ledger
    folder.add("b.png", (280, 280))
    assert files(folder.open()) == ["a.png", "b.png", "c.png"]


def test_no_sample_left_is_an_error(folder):
    folder.add("a.png")
    images = folder.open()
    images.check_usable()
    images.exclude(0, "damaged", "truncated")
    with pytest.raises(DataError, match="no images detected in dataset cats"):
        images.check_usable()


def test_a_file_gone_since_is_unreadable(folder):
    path = folder.add("a.png")
    images = folder.open()
    path.unlink()
    with pytest.raises(Unreadable, match="cannot be opened"):
        images.read(0)


def test_identical_pictures_are_noted_once_their_digests_are_known(folder):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        folder.add(name)
    images = folder.open()
    assert images.ledger.notes == ()
    for sample, digest in enumerate((b"x", b"y", b"x", b"x")):
        images.remember(sample, digest, "key", "recipe")
    images.exclude(0, "damaged")
    assert images.ledger.notes == (Note("d.png", "identical to c.png"),)


def test_a_missing_folder_is_an_error_with_its_mend(folder):
    error = folder.refused(instance_data_dir="/no/such/folder")
    assert "/no/such/folder cannot be searched: No such file or directory" in str(error)
    assert "instance_data_dir" in error.problem.mend
    assert error.exit_code == 2


def test_a_file_in_place_of_the_folder_is_an_error(folder):
    assert "Not a directory" in str(folder.refused(instance_data_dir=str(folder.add("a.png"))))


def test_an_empty_folder_is_an_error_with_its_mend(folder):
    (folder.root / "notes.txt").write_text("no picture")
    error = folder.refused()
    assert "no images detected in dataset cats" in str(error)
    assert "put pictures into it" in error.problem.mend


def test_no_usable_picture_is_an_error_that_names_files_reasons_and_mend(folder):
    for n in range(12):
        folder.add(f"{n:02}.png", (100, 100))
    error = folder.refused(minimum_image_size=128)
    assert "no images detected in dataset cats: none of the 12 pictures" in error.problem.what
    assert "00.png: below minimum_image_size (100x100: the minimum is 128 (pixel_area))" in error.problem.why
    assert "09.png" in error.problem.why
    assert "10.png" not in error.problem.why
    assert "and 2 more" in error.problem.why
    assert error.problem.mend == "lower minimum_image_size."


def test_missing_captions_are_counted_and_named(folder):
    for n in range(14):
        folder.add(f"{n:02}.png", text="a fox" if n < 2 else None)
    error = folder.refused(caption_strategy="textfile")
    assert "Dataset `cats`: 12 of 14 pictures have no caption: 02.png, " in error.problem.what
    assert error.problem.what.endswith(" 11.png, and 2 more.")
    assert "there is no 02.txt" in error.problem.why
    assert "caption_missing" in error.problem.mend


@pytest.mark.parametrize(
    ("content", "detail"),
    [(None, "there is no b.txt"), (b"", "b.txt is empty"), (b" \n", "no text"), ("Füchse".encode("latin-1"), "in UTF-8")],
)
def test_each_way_of_missing_a_caption_is_told_apart(folder, content, detail):
    folder.add("a.png", text="a fox")
    folder.add("b.png")
    if content is not None:
        (folder.root / "b.txt").write_bytes(content)
    images = folder.open(caption_strategy="textfile", caption_missing="skip")
    assert files(images) == ["a.png"]
    (excluded,) = images.ledger.excluded
    assert (excluded.file, excluded.reason) == ("b.png", "no caption")
    assert detail in excluded.detail


def test_a_missing_caption_can_be_the_instance_prompt(folder):
    folder.add("a.png", text="a fox")
    folder.add("b.png")
    keys = {"caption_strategy": "textfile", "caption_missing": "instance_prompt"}
    images = folder.open(**keys, instance_prompt="a sks fox")
    assert [images.captions(sample) for sample in (0, 1)] == [("a fox",), ("a sks fox",)]
    assert "b.png" in str(folder.refused(**keys))


def test_captions_of_excluded_pictures_are_not_asked_for(folder):
    folder.add("a.png", text="a fox")
    folder.add("small.png", (15, 15))
    assert files(folder.open(caption_strategy="textfile")) == ["a.png"]


def test_a_size_off_the_alignment_is_rounded_and_told(folder):
    folder.add("a.png")
    assert folder.open(resolution=(256, 250)).buckets == ((256, 256),)
    assert folder.notices() == ["cats: resolution 256x250 becomes 256x256: edges are multiples of 64 px."]
    folder.told.clear()
    folder.open(resolution=(256, 192))
    assert folder.notices() == []


def test_named_sizes_off_the_alignment_are_rounded_and_each_is_told(folder):
    folder.add("a.png")
    folder.add("b.png", (500, 300))
    images = folder.open(bucket_resolutions=[(250, 250), (320, 192), (300, 200)])
    assert images.buckets == ((256, 256), (320, 192))
    assert folder.notices() == [
        "cats: resolution 250x250 becomes 256x256: edges are multiples of 64 px.",
        "cats: resolution 300x200 becomes 320x192: edges are multiples of 64 px.",
    ]


def test_of_many_pictures_a_fixed_choice_is_used_and_the_others_are_accounted_for(folder):
    for n in range(12):
        folder.add(f"{n:02}.png", (256, 256) if n % 2 else (256, 200))
    images = folder.open(max_num_samples=5)
    chosen = files(images)
    assert len(chosen) == 5
    assert files(folder.open(max_num_samples=5)) == chosen
    assert set(chosen) < set(files(folder.open(max_num_samples=8)))
    assert files(folder.open(id="dogs", max_num_samples=5)) != chosen
    assert [images.place(i).target_WH for i in range(5)] == [images.buckets[bucket] for bucket in images.bucket_ids]
    ledger = images.ledger
    assert (ledger.found, ledger.used) == (12, 5)
    assert {(one.reason, one.detail) for one in ledger.excluded} == {("not chosen", "max_num_samples is 5")}
    assert len(folder.open(max_num_samples=12)) == 12
    assert len(folder.open(max_num_samples=99)) == 12


def test_a_choice_loses_no_more_pictures_than_are_added(folder):
    for n in range(12):
        folder.add(f"{n:02}.png")
    before = set(files(folder.open(max_num_samples=6)))
    for n in range(3):
        folder.add(f"new_{n}.png")
    assert len(before - set(files(folder.open(max_num_samples=6)))) <= 3


def test_what_is_not_chosen_is_not_noted_either(folder):
    for n in range(4):
        folder.add(f"{n}.png", (64, 64))
    assert len(folder.open(max_num_samples=1).ledger.notes) == 1


def test_a_caption_that_is_never_read_may_be_missing(folder):
    folder.add("a.png")
    images = folder.open(caption_strategy="textfile", only_instance_prompt=True, instance_prompt="a sks cat")
    assert images.captions(0) == ("a sks cat",)


def test_measurements_are_kept_when_captions_are_missing(folder):
    folder.add("a.png")
    folder.refused(caption_strategy="textfile")
    assert [path.name for path in folder.cache.iterdir()] == ["manifest-cats.safetensors"]


def test_a_rank_takes_the_word_of_the_one_that_searched(folder):
    folder.add("a.png")
    folder.open()
    folder.add("b.png")
    assert files(open_dataset(folder.entry(), LATENT, tell=print, is_searched=True)) == ["a.png"]


def test_skipping_discovery_takes_the_last_manifest(folder, monkeypatch):
    path = folder.add("a.png")
    folder.open()
    folder.add("b.png")
    monkeypatch.setattr(os, "scandir", None)
    images = folder.open(skip_file_discovery="vae, metadata")
    assert files(images) == ["a.png"]
    assert images.read(0) == path.read_bytes()


def test_a_preserved_list_of_files_is_the_last_manifest_too(folder):
    folder.add("a.png")
    folder.open(preserve_data_backend_cache=True)
    assert "in spite of preserve_data_backend_cache" in folder.notices()[0]
    folder.add("b.png")
    assert files(folder.open(preserve_data_backend_cache=True)) == ["a.png"]
    assert "not searched (preserve_data_backend_cache)" in folder.notices()[-1]


@pytest.mark.parametrize("word", ["vae", "aspect", "metadata", "text"])
def test_any_word_to_skip_takes_the_last_manifest(folder, word):
    folder.add("a.png")
    folder.open()
    folder.add("b.png")
    assert files(folder.open(skip_file_discovery=word)) == ["a.png"]
    assert files(folder.open()) == ["a.png", "b.png"]


def test_skipping_discovery_without_a_fitting_manifest_searches_and_says_so(folder):
    folder.add("a.png", text="a fox")
    folder.open(skip_file_discovery="aspect")
    assert "in spite of skip_file_discovery" in folder.notices()[0]
    folder.told.clear()
    folder.open(skip_file_discovery="aspect", caption_strategy="textfile")
    assert "in spite of skip_file_discovery" in folder.notices()[0]


def test_a_damaged_manifest_is_told_and_made_afresh(folder):
    folder.add("a.png")
    folder.open()
    (path,) = folder.cache.iterdir()
    path.write_bytes(b"\0" * 40)
    folder.open()
    assert "is damaged" in folder.notices("warning")[0]
    folder.told.clear()
    folder.open()
    assert folder.notices("warning") == []


def test_two_sets_may_share_a_folder_and_a_cache(folder):
    folder.add("a.png", (512, 512))
    small, large = folder.open(id="a/b", resolution=128), folder.open(id="a_b", resolution=512)
    small.remember(0, b"digest", "small", "recipe")
    large.remember(0, b"digest", "large", "recipe")
    small.save()
    large.save()
    assert folder.open(id="a/b").remembered(0) == Remembered(b"digest", "small", "recipe")
    assert folder.open(id="a_b").remembered(0) == Remembered(b"digest", "large", "recipe")


def test_a_random_crop_stays_when_other_pictures_come(folder):
    folder.add("m.png", (512, 256))
    before = folder.open(crop=True).place(0)
    folder.add("a.png")
    images = folder.open(crop=True)
    assert images.place(1) == before


def test_a_folder_that_could_not_be_searched_is_in_the_ledger(folder, monkeypatch):
    folder.add("a.png")
    (folder.root / "shut").mkdir()
    scandir = os.scandir

    def guarded(path: str) -> Any:
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert folder.open().ledger.notes == (Note("shut/", "folder not searched: Permission denied"),)
    assert folder.notices("warning") == ["cats: shut/: folder not searched: Permission denied"]


def test_a_cache_folder_that_cannot_be_written_is_an_error_with_its_mend(folder):
    folder.add("a.png")
    folder.cache.write_bytes(b"a file")
    with pytest.raises(RunError, match="cache_dir_vae"):
        folder.open()


def test_names_of_any_kind_work(folder):
    names = ["ü 🦊 (1).png", "n" * 200 + ".png", b"caf\xe9.png".decode("utf-8", "surrogateescape")]
    for name in names:
        folder.add(name)
    images = folder.open()
    assert sorted(files(images)) == sorted(names)
    assert all(images.read(sample) for sample in range(3))
    assert files(folder.open()) == files(images)


def test_progress_is_told_while_measuring(folder):
    folder.add("a.png")
    folder.open()
    assert [event for event in folder.told if isinstance(event, Progress)] == [Progress("cats: measuring", 1, 1, "pictures")]
