from __future__ import annotations

import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from simpletuner.evaluation.files import png_of
from simpletuner.evaluation.names import facts, file_name
from simpletuner.evaluation.page import PAGE, write_page
from simpletuner.events import Event, Notice, Weights
from simpletuner.families.base import Shot

CAT = Shot("cat", 0, "a cat", "", 64, 32, seed=7, guidance=4.5, steps=2)
EVIL = Shot('</title><script>alert("1")</script>', 1, 'a "dog" & <b onload=x>', "", 32, 32, seed=7, guidance=4.5, steps=2)


class Outline(HTMLParser):
    """Tables as rows of cells: a heading's text, or what a picture links to; and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "a":
            self.rows[-1][-1] = unquote(dict(attributes)["href"] or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and self.rows[-1] and not self.rows[-1][-1].endswith(".png"):
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def told() -> list[Event]:
    return []


def paint(folder: Path, shot: Shot, step: int, weights: Weights = "trained") -> str:
    name = f"{'benchmark' if weights == 'base' else 'validation'}/{file_name(shot, step, weights)}"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(png_of(Image.new("RGB", (shot.width_px, shot.height_px)), facts(shot, step, weights)))
    return name


def outline(folder: Path, told: list[Event]) -> Outline:
    write_page(folder, told.append, galleries=("benchmark", "validation"))
    return Outline((folder / PAGE).read_text(encoding="utf-8"))


def test_steps_stand_side_by_side_and_the_average_beneath(tmp_path: Path, told: list[Event]) -> None:
    base = paint(tmp_path, CAT, 0, "base")
    late, early = paint(tmp_path, CAT, 100), paint(tmp_path, CAT, 20)
    average = paint(tmp_path, CAT, 100, "ema")
    evil = paint(tmp_path, EVIL, 100)
    rows = outline(tmp_path, told).rows
    assert rows[0] == ["base", "step 20", "step 100"]
    assert rows[2:4] == [[base, early, late], ["", "", average]]
    assert rows[5] == ["", "", evil]
    assert told == []


def test_the_base_stands_beside_the_average_where_nothing_else_was_painted(tmp_path: Path, told: list[Event]) -> None:
    base, average = paint(tmp_path, CAT, 0, "base"), paint(tmp_path, CAT, 5, "ema")
    assert outline(tmp_path, told).rows[2:] == [[base, average]]


def test_words_of_users_are_words_and_nothing_else(tmp_path: Path, told: list[Event]) -> None:
    folder = tmp_path / "<i>run"
    folder.mkdir()
    name = paint(folder, EVIL, 5)
    read = outline(folder, told)
    assert not {"script", "i", "b"} & set(read.tags)
    assert any(EVIL.prompt in text for text in read.texts)
    assert any(EVIL.nickname in text for text in read.texts)
    assert read.rows[-1] == [name]
    assert (folder / name).is_file()


def test_it_loads_nothing_but_the_pictures(tmp_path: Path, told: list[Event]) -> None:
    paint(tmp_path, CAT, 5)
    assert not {"script", "link", "iframe"} & set(outline(tmp_path, told).tags)
    assert "http" not in (tmp_path / PAGE).read_text(encoding="utf-8")


def test_a_changed_prompt_and_each_size_have_rows_of_their_own(tmp_path: Path, told: list[Event]) -> None:
    paint(tmp_path, CAT, 5)
    paint(tmp_path, replace(CAT, width_px=96), 5)
    paint(tmp_path, replace(CAT, prompt="another cat"), 10)
    rows = outline(tmp_path, told).rows
    assert [len([cell for cell in row if cell.endswith(".png")]) for row in rows[2::2]] == [1, 1, 1]


def test_there_is_no_page_before_there_is_a_picture(tmp_path: Path, told: list[Event]) -> None:
    write_page(tmp_path, told.append, galleries=("benchmark", "validation"))
    assert os.listdir(tmp_path) == []


def test_a_page_that_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path, told: list[Event]) -> None:
    paint(tmp_path, CAT, 5)
    (tmp_path / PAGE).mkdir()
    write_page(tmp_path, told.append, galleries=("validation",))
    (notice,) = told
    assert isinstance(notice, Notice)
    assert "gallery.html could not be written" in notice.text
