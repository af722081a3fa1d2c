"""What `check` warns of; that it shows what there is, end to end, is in tests/e2e/test_train.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from simpletuner import checkup
from simpletuner.checkup import memory_warnings, room_problems, room_warnings, torchvision_problems
from simpletuner.config.run import Hardware, Run
from simpletuner.disk import Room
from simpletuner.estimates import GIB, Memory, Stage

STEP = Stage("training", 10 * GIB, 12 * GIB)
MEMORY = Memory((STEP,), STEP, is_shared=False)


def install(folder: Path, version: str, wants: str) -> None:
    """A torchvision as pip leaves it, for `importlib.metadata`."""
    place = folder / f"torchvision-{version}.dist-info"
    place.mkdir()
    place.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchvision\nVersion: {version}\nRequires-Dist: {wants}\n"
    )


@pytest.mark.parametrize("wants", ["torch==2.5.1", "torch (==2.5.1)"])
def test_a_torchvision_of_another_torch_is_a_problem_with_its_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wants: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "0.20.1", wants)
    [problem] = torchvision_problems()
    assert "torchvision 0.20.1 was built for torch 2.5" in problem.what
    assert problem.mend.startswith("pip uninstall torchvision")


def test_a_torchvision_that_fits_or_none_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(torchvision_problems())
    monkeypatch.syspath_prepend(str(tmp_path))
    minor = ".".join(checkup.metadata.version("torch").split(".")[:2])
    install(tmp_path, "9.9", f"torch=={minor}.0")
    assert not list(torchvision_problems())


def test_a_card_that_is_too_small_is_told_with_what_saves_memory(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "machine_bytes", lambda: 64 * GIB)
    run = make_run("sana")
    small, large = (replace(run, hardware=Hardware("cuda", name="a card", memory_bytes=each * GIB)) for each in (24, 25))
    [told] = memory_warnings(small, MEMORY)
    assert told.startswith("The run takes about 24.7 GiB, but a card has 24.0 GiB: store the base in fewer bits")
    assert not list(memory_warnings(large, MEMORY))


def test_a_machine_with_too_little_memory_is_told(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "machine_bytes", lambda: 16 * GIB)
    [told] = memory_warnings(make_run("sana"), replace(MEMORY, is_shared=True))
    assert told == "The run takes about 23.5 GiB of ordinary memory, and this machine has 16.0 GiB."


def test_a_disk_too_small_for_the_first_checkpoint_is_a_problem_and_for_the_rest_a_warning() -> None:
    full, tight, roomy = (Room("output", needed_bytes=9, first_bytes=5, free_bytes=free) for free in (4, 5, 9))
    assert [len(list(room_problems([room]))) for room in (full, tight, roomy)] == [1, 0, 0]
    assert [len(list(room_warnings([room]))) for room in (full, tight, roomy)] == [0, 1, 0]
