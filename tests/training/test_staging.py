from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.data.ranks import Alone
from simpletuner.errors import RunError, UserError
from simpletuner.training.staging import locked, move_into_place, remove, staged

HOLD = """
import sys
from pathlib import Path
from simpletuner.data.ranks import Alone
from simpletuner.training.staging import locked
with locked(Path(sys.argv[1]), Alone(), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("only root can mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-1"
    with staged(target) as folder:
        (folder / "one.txt").write_text("1")
        assert not target.exists()
        move_into_place(folder, target)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (target / "one.txt").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        (folder / "one.txt").write_text("1")
        raise error

    with pytest.raises(error), staged(tmp_path / "checkpoint-1") as folder:
        fail(folder)
    assert not list(tmp_path.iterdir())


def test_a_new_folder_takes_the_place_of_a_former_one(tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    for text in ("former", "new"):
        with staged(tmp_path / "result") as folder:
            (folder / "pipeline").mkdir()
            (folder / "pipeline" / "which").write_text(text)
            move_into_place(folder / "pipeline", target)
    assert (target / "which").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(bytes(1 << 20)), lambda path: save_file({"a": torch.zeros(1 << 18)}, path)]
)
def test_a_full_disk_is_one_clear_error_and_gives_its_space_back(small_disk: Path, write) -> None:
    (small_disk / "before").write_bytes(bytes(50_000))
    with (
        pytest.raises(RunError, match=r"checkpoint-2 could not be written: .*No space left(.|\n)*Mend: make room"),
        staged(small_disk / "checkpoint-2") as folder,
    ):
        write(folder / "big")
    assert [path.name for path in small_disk.iterdir()] == ["before"]
    (small_disk / "after").write_bytes(bytes(100_000))


def test_a_second_run_in_a_folder_is_refused_with_the_firsts_number(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by another run \\(process {first.pid}\\)"), locked(tmp_path, Alone(), print):
        pass
    first.kill()  # a lock goes with its process, however that ends
    first.wait()
    with locked(tmp_path, Alone(), print):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    first.stdin.close()
    first.stdout.close()


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    for name in (".staging-checkpoint-3", ".deleting-checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
    with locked(tmp_path, Alone(), print):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-2"]


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "output", Alone(), print):
        pass


def test_a_removed_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1" / "deep").mkdir(parents=True)
    remove(tmp_path / "checkpoint-1")
    assert not list(tmp_path.iterdir())
