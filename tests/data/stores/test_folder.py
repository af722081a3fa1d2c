"""A local folder as a store."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from simpletuner.data.stores.folder import Folder


def picture(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def found(root: Path) -> list[str]:
    return list(Folder(root).listing(print).files)


def test_pictures_are_found_in_all_folders_in_the_order_of_their_paths(tmp_path):
    for name in ("b.jpg", "a/z.PNG", "a.jpg", "a/b/c.webp", "ü n.gif", "same.jpg", "same.png"):
        picture(tmp_path / name)
    assert found(tmp_path) == ["a.jpg", "a/b/c.webp", "a/z.PNG", "b.jpg", "same.jpg", "same.png", "ü n.gif"]


def test_hidden_files_and_folders_and_other_kinds_are_passed_over(tmp_path):
    for name in ("._a.jpg", ".hidden/a.jpg", "a/.b.png"):
        picture(tmp_path / name)
    for name in ("notes.txt", "film.mp4", "jpg", "a.jpg.part"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert found(tmp_path) == []


def test_links_in_a_circle_end(tmp_path):
    picture(tmp_path / "a/x.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "0").symlink_to(tmp_path / "a")
    assert found(tmp_path) == ["a/x.jpg"]


def test_a_folder_with_several_links_goes_by_the_first_name(tmp_path):
    picture(tmp_path / "elsewhere/x.jpg")
    (tmp_path / "root").mkdir()
    for name in "hgfedcba":
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "root") == ["a/x.jpg"]


def test_linked_folders_and_files_are_followed(tmp_path):
    picture(tmp_path / "elsewhere/x.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/y.jpg").symlink_to(tmp_path / "elsewhere/x.jpg")
    assert found(tmp_path / "root") == ["link/x.jpg", "y.jpg"]


def test_a_folder_that_cannot_be_searched_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "open/x.jpg")
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    listing = Folder(tmp_path).listing(print)
    assert listing.files == ["open/x.jpg"]
    assert listing.closed == {"shut/": "Permission denied"}
    assert Folder(tmp_path / "none").listing(print).closed == {"": "No such file or directory"}
