"""Files written whole: the old content or the new one, and no litter of writers that were killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.data.whole import this_machine, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "f", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "f", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("f", b"old")]


def test_what_killed_writers_of_the_same_file_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, others = (tmp_path / f".{name}.{this_machine()}.{gone.pid}.0a1b.tmp" for name in ("f", "g"))
    alive = tmp_path / f".f.{this_machine()}.{os.getppid()}.0a1b.tmp"
    for path in (left, others, alive):
        path.write_bytes(b"half")
    write_whole(tmp_path / "f", b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"f", others.name, alive.name}
