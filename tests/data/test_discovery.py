"""Measuring only what is new."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.data.discovery import CANNOT_OPEN, TEXT_FILES, discover
from simpletuner.data.manifest import Manifest, Remembered
from simpletuner.data.stores.folder import Folder


def picture(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def survey(root: Path, old: Manifest | None = None, *, with_captions: bool = False) -> Manifest:
    store = Folder(root)
    captions_from = TEXT_FILES if with_captions else ""
    return discover(store, store.listing(print), old, captions_from=captions_from, progress=lambda done, total: None)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the pictures whose headers were read."""
    names: list[str] = []
    measure = Folder.measure
    monkeypatch.setattr(Folder, "measure", lambda store, file: names.append(os.path.basename(file)) or measure(store, file))
    return names


def test_sizes_are_measured_and_faults_kept(tmp_path):
    picture(tmp_path / "a.png", (100, 50))
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "gone.jpg")
    manifest = survey(tmp_path)
    assert manifest.edges.tolist() == [[100, 50], [0, 0], [0, 0], [0, 0]]
    assert {row: reason for row, (reason, _) in manifest.faults.items()} == {
        1: "empty file",
        2: "not a picture",
        3: CANNOT_OPEN,
    }


def test_nothing_is_opened_when_nothing_changed(tmp_path, opened):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("a fox")
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    first = survey(tmp_path, with_captions=True)
    assert opened == ["a.png", "b.png", "bad.jpg"]
    assert survey(tmp_path, first, with_captions=True) is first
    assert len(opened) == 3


def test_only_what_changed_is_opened_again(tmp_path, opened):
    for name in ("a.png", "c.png", "d.png"):
        picture(tmp_path / name)
    first = survey(tmp_path)
    for row, word in enumerate("acd"):
        first.remember(row, Remembered(word.encode(), f"key-{word}", "recipe"))
    opened.clear()
    picture(tmp_path / "b.png", (20, 20))
    picture(tmp_path / "c.png", (200, 100))
    (tmp_path / "d.png").unlink()
    second = survey(tmp_path, first)
    assert opened == ["b.png", "c.png"]
    assert second.files.strings() == ["a.png", "b.png", "c.png"]
    assert second.edges.tolist() == [[64, 48], [20, 20], [200, 100]]
    learned = [second.remembered(row) for row in range(3)]
    assert learned == [Remembered(b"a", "key-a", "recipe"), None, Remembered(b"c", "key-c", "recipe")]
    assert second.is_current.tolist() == [True, False, False]


def test_a_changed_time_alone_is_looked_at(tmp_path, opened):
    path = picture(tmp_path / "a.png")
    first = survey(tmp_path)
    os.utime(path, ns=(1, 1))
    survey(tmp_path, first)
    assert opened == ["a.png", "a.png"]


def test_a_mended_file_is_a_fault_no_more(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bad")
    (tmp_path / "b.png").write_bytes(b"bad")
    first = survey(tmp_path)
    picture(tmp_path / "a.png")
    assert set(survey(tmp_path, first).faults) == {1}


def test_a_file_that_could_not_be_opened_is_tried_again(tmp_path, opened):
    picture(tmp_path / "a.png")
    first = survey(tmp_path)
    first.faults[0] = (CANNOT_OPEN, "Permission denied")
    assert survey(tmp_path, first).faults == {}


def test_another_folders_manifest_is_not_believed(tmp_path, opened):
    picture(tmp_path / "one/a.png")
    os.makedirs(tmp_path / "two")
    os.link(tmp_path / "one/a.png", tmp_path / "two/a.png")
    survey(tmp_path / "two", survey(tmp_path / "one"))
    assert opened == ["a.png", "a.png"]


def test_captions_follow_their_files(tmp_path):
    for name in ("a.png", "b.png", "c.d.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("a fox\n")
    (tmp_path / "c.d.txt").write_bytes(b"\xff\xfe\xff")
    first = survey(tmp_path, with_captions=True)
    assert first.captions.strings() == ["a fox", "", ""]
    (tmp_path / "a.txt").write_text("the fox runs")
    (tmp_path / "b.txt").write_text("a hen")
    second = survey(tmp_path, first, with_captions=True)
    assert second.captions.strings() == ["the fox runs", "a hen", ""]
    (tmp_path / "a.txt").unlink()
    assert survey(tmp_path, second, with_captions=True).captions.strings() == ["", "a hen", ""]


def test_captions_are_read_once_they_are_wanted(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a fox")
    first = survey(tmp_path)
    assert first.captions.strings() == [""]
    assert survey(tmp_path, first, with_captions=True).captions.strings() == ["a fox"]


def test_a_caption_file_that_could_not_be_opened_is_tried_again(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a fox")
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
        first = survey(tmp_path, with_captions=True)
    assert first.captions.strings() == [""]
    assert survey(tmp_path, first, with_captions=True).captions.strings() == ["a fox"]


def test_progress_ends_at_the_total(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    told: list[tuple[int, int]] = []
    store = Folder(tmp_path)
    discover(store, store.listing(print), None, captions_from="", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2, 2)
