from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner import disk
from simpletuner.config.run import Run
from simpletuner.disk import Room, Writing, checkpoint_writings, rooms, unwritable

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("steps", "interval", "limit", "at_once"),
    [(2000, 500, 5, 4), (2000, 500, 2, 3), (2100, 500, 0, 5), (100, 500, 5, 1), (2000, 0, 5, 1)],
)
def test_checkpoints_are_counted_as_rotation_keeps_them(
    make_run: Callable[..., Run], steps: int, interval: int, limit: int, at_once: int
) -> None:
    run = make_run("sana", checkpoint_step_interval=interval, checkpoints_total_limit=limit)
    first, others, result = checkpoint_writings(run, saved_bytes=10, result_bytes=7, steps=steps)
    assert (first.size_bytes + others.size_bytes, result.size_bytes) == (10 * at_once, 7)


def test_what_lies_on_one_disk_is_summed_and_folders_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(100, 50, 50))
    cache, output = str(tmp_path / "cache" / "vae"), str(tmp_path / "output")
    writings = [Writing("latents", cache, 30), Writing("the result", output, 25, is_first=False)]
    assert rooms(writings) == [Room(cache, needed_bytes=55, first_bytes=30, free_bytes=50)]
    assert not list(tmp_path.iterdir()), "nothing is made to find out"


def test_a_file_in_the_way_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("not a folder")
    problem = unwritable("output_dir", str(tmp_path / "output" / "run"))
    assert problem is not None
    assert f"{tmp_path / 'output'} is a file" in problem.what
    assert unwritable("output_dir", str(tmp_path / "other" / "run")) is None


@pytest.mark.parametrize("place", ["run", "closed/run", "closed/deeper/run"])
def test_a_folder_without_the_right_to_write_is_told(tmp_path: Path, place: str) -> None:
    """As a user who is not root: `tmp_path` is its owner's alone, so not even what is in it can be seen."""
    (tmp_path / "closed").mkdir()
    tmp_path.chmod(0o500 if place == "run" else 0o700)
    (tmp_path / "closed").chmod(0o000)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        problem = unwritable("output_dir", str(tmp_path / place))
    finally:
        if is_root:
            os.seteuid(0)
        tmp_path.chmod(0o700)
    assert problem is not None
    assert "which cannot be written: there is no right to write into" in problem.what
