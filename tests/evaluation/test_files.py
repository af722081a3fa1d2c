from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.evaluation import files
from simpletuner.evaluation.files import PictureFiles, png_of

PNG = png_of(Image.effect_noise((256, 256), 90), {})
"""Some 50 KB: noise does not shrink."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_what_it_could_not_take_until_there_is_room(disk: Path) -> None:
    pictures = PictureFiles()
    for number in range(4):
        pictures.write(disk / f"{number}.png", PNG)
    there = sorted(os.listdir(disk))
    assert 0 < len(there) < 4, "the test's disk is of a wrong size"
    account = pictures.account()
    assert account.written == [str(disk / name) for name in there]
    assert account.waiting == [str(disk / f"{number}.png") for number in range(len(there), 4)]
    assert "No space left" in account.reason
    assert pictures.open(disk / "3.png").size == (256, 256)
    for name in there:
        os.remove(disk / name)
    pictures.retry()
    later = pictures.account()
    assert (later.written, later.waiting) == (account.waiting, [])
    pictures.give_up()
    assert pictures.account().lost == []


def test_a_picture_that_never_found_room_is_lost_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "1.png"
    pictures = PictureFiles()
    pictures.write(path, PNG)
    pictures.give_up()
    account = pictures.account()
    assert (account.written, account.waiting, account.lost) == ([], [], [str(path)])
    assert pictures.account().lost == [], "what is lost is said once"


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "KEPT_BYTES", 2 * len(PNG))
    (tmp_path / "file").touch()
    pictures = PictureFiles()
    paths = [tmp_path / "file" / f"{number}.png" for number in range(3)]
    for path in paths:
        pictures.write(path, PNG)
    assert [pictures.has(path) for path in paths] == [False, True, True]
    account = pictures.account()
    assert (account.lost, account.waiting) == ([str(paths[0])], [str(path) for path in paths[1:]])


def test_a_failed_write_leaves_the_former_picture_whole(disk: Path) -> None:
    pictures = PictureFiles()
    pictures.write(disk / "1.png", PNG)
    pictures.write(disk / "1.png", png_of(Image.effect_noise((512, 512), 90), {}))
    assert (disk / "1.png").read_bytes() == PNG
    assert os.listdir(disk) == ["1.png"]


def test_quick_compression_is_still_a_whole_picture(tmp_path: Path) -> None:
    image = Image.effect_noise((8, 8), 90)
    (tmp_path / "a.png").write_bytes(png_of(image, {"prompt": "ä"}, compression=1))
    with Image.open(tmp_path / "a.png") as read:
        assert read.tobytes() == image.tobytes()
        assert read.info["prompt"] == "ä"
