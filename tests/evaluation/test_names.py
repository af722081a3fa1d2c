from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simpletuner.evaluation.files import png_of
from simpletuner.evaluation.names import facts, file_name, file_stem, is_painted, pictures_in
from simpletuner.families.base import Shot

SHOT = Shot("cat", 0, "a cat", "", 64, 32, seed=7, guidance=4.5, steps=2)


def paint(folder: Path, shot: Shot, step: int = 5) -> Path:
    path = folder / file_name(shot, step)
    path.write_bytes(png_of(Image.new("RGB", (64, 32)), facts(shot, step)))
    return path


@pytest.mark.parametrize(
    "nickname",
    ["chef_<token>", "a/b\\..", "..", "😀", "CON", "x" * 300, "é" * 300, "", ".", "../../etc/passwd", "tab\there\n", "你好"],
)
def test_any_nickname_makes_a_file(nickname: str, tmp_path: Path) -> None:
    path = paint(tmp_path, replace(SHOT, nickname=nickname))
    assert os.listdir(tmp_path) == [path.name]
    assert path.name.startswith("step_5_")
    assert path.name.endswith("_0_64x32.png")
    assert not file_stem(replace(SHOT, nickname=nickname)).startswith("."), "a preview would be hidden"


@given(nickname=st.text(max_size=400), step=st.integers(0, 10**9))
def test_a_file_name_holds_no_character_that_a_file_system_forbids(nickname: str, step: int) -> None:
    name = file_name(replace(SHOT, nickname=nickname), step)
    assert len(name.encode()) < 240
    assert not set(name) & set('/\\<>:"|?* \0\n\r\t')


def test_nicknames_that_become_the_same_name_do_not_collide() -> None:
    names = {file_name(replace(SHOT, nickname=nickname, index=i), 1) for i, nickname in enumerate(["a/b", "a b", "a_b"])}
    assert len(names) == 3


def test_a_damaged_picture_does_not_count_as_painted(tmp_path: Path) -> None:
    path = tmp_path / file_name(SHOT, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n half")
    assert not is_painted(path, SHOT, 0)


@given(nickname=st.text(max_size=40), prompt=st.text(max_size=40))
def test_whatever_a_picture_says_of_itself_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, nickname: str, prompt: str
) -> None:
    folder, shot = tmp_path_factory.mktemp("pictures"), replace(SHOT, nickname=nickname, prompt=prompt, index=3)
    path = paint(folder, shot)
    assert is_painted(path, shot, 5)
    (found,) = pictures_in(folder)
    assert (found.path, found.index, found.size_WH, found.step) == (path, 3, (64, 32), 5)
    assert (found.texts["nickname"], found.texts["prompt"]) == (nickname, prompt)


def test_pictures_of_others_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "step_1_mine_0_4x4.png")
    (tmp_path / "step_2_broken_0_4x4.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    assert pictures_in(tmp_path) == []
    assert pictures_in(tmp_path / "nowhere") == []
