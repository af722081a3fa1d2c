from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.evaluation import files
from simpletuner.evaluation.files import PictureFiles, png_of
from simpletuner.events import Event, Notice, Painted

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


def painted(folder: Path, number: int) -> Painted:
    return Painted(folder / f"{number}.png", "cat", "a cat", number)


def warnings(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Notice) and event.level == "warning"]


def test_a_full_disk_keeps_what_it_could_not_take_until_there_is_room(disk: Path) -> None:
    told: list[Event] = []
    pictures = PictureFiles()
    for number in range(4):
        pictures.write(PNG, painted(disk, number), told.append)
    pictures.report(told.append, is_last=False)
    there = sorted(os.listdir(disk))
    assert 0 < len(there) < 4, "the test's disk is of a wrong size"
    assert [event.path.name for event in told if isinstance(event, Painted)] == there
    (warning,) = warnings(told)
    assert "No space left" in warning
    assert "3.png" in warning
    assert pictures.open(disk / "3.png").size == (256, 256)
    for name in there:
        os.remove(disk / name)
    pictures.retry(told.append)
    assert {event.path.name for event in told if isinstance(event, Painted)} == {f"{number}.png" for number in range(4)}
    pictures.report(told.append, is_last=True)
    assert len(warnings(told)) == 1


def test_a_picture_that_never_found_room_is_told_as_lost(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told: list[Event] = []
    pictures = PictureFiles()
    pictures.write(PNG, painted(tmp_path / "file", 1), told.append)
    pictures.report(told.append, is_last=True)
    (warning,) = warnings(told)
    assert "1.png" in warning
    assert "is lost" in warning
    assert "start the same command again" in warning


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "KEPT_BYTES", 2 * len(PNG))
    (tmp_path / "file").touch()
    told: list[Event] = []
    pictures = PictureFiles()
    for number in range(3):
        pictures.write(PNG, painted(tmp_path / "file", number), told.append)
    assert [pictures.has(tmp_path / "file" / f"{number}.png") for number in range(3)] == [False, True, True]
    pictures.report(told.append, is_last=False)
    lost, kept = warnings(told)
    assert "0.png" in lost
    assert "1.png, 2.png" in kept


def test_a_failed_write_leaves_the_former_picture_whole(disk: Path) -> None:
    told: list[Event] = []
    pictures = PictureFiles()
    pictures.write(PNG, painted(disk, 1), told.append)
    larger = png_of(Image.effect_noise((512, 512), 90), {})
    pictures.write(larger, painted(disk, 1), told.append)
    assert (disk / "1.png").read_bytes() == PNG
    assert os.listdir(disk) == ["1.png"]


def test_quick_compression_is_still_a_whole_picture(tmp_path: Path) -> None:
    image = Image.effect_noise((8, 8), 90)
    (tmp_path / "a.png").write_bytes(png_of(image, {"prompt": "ä"}, compression=1))
    with Image.open(tmp_path / "a.png") as read:
        assert read.tobytes() == image.tobytes()
        assert read.info["prompt"] == "ä"
