"""Tables beside a folder: which pictures are meant, and what is known of them unopened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.ledger import Exclusion, Note
from simpletuner.data.pixels import Unreadable, read_pixels
from simpletuner.data.samples import LatentSpec
from simpletuner.data.stores.folder import Folder
from simpletuner.errors import DataError
from simpletuner.events import Event, Notice

LATENT = LatentSpec(channels=32, cell_px=32, alignment_px=64, native_edge_px=256)


class Tables:
    """A folder of pictures with a table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[Event] = []
        for name in ("a.png", "b/c.png", "d.png"):
            (path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (256, 256), (len(name), 0, 0)).save(path / "pictures" / name)

    def write(self, columns: dict[str, list[Any]], name: str = "table.parquet") -> Path:
        path = self.path / name
        if name.endswith(".parquet"):
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table(columns), path)
        else:
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def open(self, *, table: str = "table.parquet", strategy: str = "parquet", skip: str = "", **parquet: Any) -> ImageSet:
        said = {"path": str(self.path / table), "filename_column": "id", "caption_column": "caption", **parquet}
        entry = ImageDataset(
            id="cats", instance_data_dir=str(self.path / "pictures"), cache_dir_vae=str(self.path / "cache"),
            metadata_backend="parquet", caption_strategy=strategy, skip_file_discovery=skip,
            parquet={key: value for key, value in said.items() if value is not None},
        )  # fmt: skip
        return open_dataset(entry, LATENT, tell=self.told.append)

    def refused(self, **keys: Any) -> str:
        with pytest.raises(DataError) as caught:
            self.open(**keys)
        return str(caught.value)


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return Tables(tmp_path)


def captions(images: ImageSet) -> dict[str, tuple[str, ...]]:
    return {images.file(sample): images.captions(sample) for sample in images.alive().tolist()}


@pytest.mark.parametrize("name", ["table.parquet", "table.jsonl", "folder/part-0.parquet"])
def test_captions_come_from_a_column_by_name_in_whatever_order(tables, name):
    tables.write({"id": ["d", "a", "b/c"], "caption": ["a dog", "an ape\nwith a hat", " a cow "], "other": [1, 2, 3]}, name)
    images = tables.open(table=name.partition("/")[0])
    assert captions(images) == {"a.png": ("an ape\nwith a hat",), "b/c.png": ("a cow",), "d.png": ("a dog",)}


def test_names_may_be_numbers_or_hold_their_ending(tables):
    Image.new("RGB", (256, 256)).save(tables.path / "pictures" / "17.png")
    tables.write({"id": [17], "caption": ["seventeen"]})
    assert captions(tables.open()) == {"17.png": ("seventeen",)}
    tables.write({"id": ["17.png", "a"], "caption": ["seventeen", "no file of this name"]})
    assert captions(tables.open(identifier_includes_extension=True)) == {"17.png": ("seventeen",)}


@pytest.mark.parametrize("name", ["table.parquet", "table.jsonl"])
def test_a_list_is_alternatives_and_an_empty_cell_takes_the_fallback(tables, name):
    lists = [["an ape", None, " a monkey "], [], None]
    tables.write({"id": ["a", "b/c", "d"], "caption": lists, "tags": ["x", "cow, field", "dog"]}, name)
    images = tables.open(table=name, fallback_caption_column="tags")
    assert captions(images) == {"a.png": ("an ape", "a monkey"), "b/c.png": ("cow, field",), "d.png": ("dog",)}


def test_sizes_from_the_table_spare_the_headers(tables, monkeypatch):
    measured: list[str] = []
    measure = Folder.measure
    monkeypatch.setattr(Folder, "measure", lambda store, file: measured.append(file) or measure(store, file))
    sizes = {"w": [512, 256, None], "h": [256.0, 256.0, 256.0]}
    tables.write({"id": ["a", "b/c", "d"], "caption": ["ape", "cow", "dog"], **sizes})
    images = tables.open(width_column="w", height_column="h")
    assert measured == ["d.png"], "the one whose size the table does not know"
    assert [images.place(sample).original_WH for sample in range(3)] == [(512, 256), (256, 256), (256, 256)]
    tables.open(width_column="w", height_column="h")
    assert measured == ["d.png"]
    assert tables.open().place(0).original_WH == (256, 256), "without these columns, headers are read after all"


def test_pictures_of_other_sizes_than_the_table_says_are_told_with_the_mend(tables):
    tables.write({"id": ["a"], "caption": ["ape"], "w": [512], "h": [128]})
    images = tables.open(width_column="w", height_column="h")
    with pytest.raises(Unreadable) as caught:
        read_pixels(images.read(0), images.place(0))
    images.exclude(0, caught.value.reason, caught.value.detail)
    with pytest.raises(
        DataError, match=r"512x128 was .* said by its table(.|\n)*Mend: .*if a table says the sizes, correct them"
    ):
        images.check_usable()


def test_what_is_only_in_the_folder_or_only_in_the_table_is_in_the_ledger(tables):
    tables.write({"id": ["a", None, "d", "gone", "gone too"], "caption": ["ape", "no name", "dog", "x", "y"]})
    ledger = tables.open().ledger
    assert ledger.summary == "cats: 3 found = 2 used + 1 excluded (1 not in the table)"
    assert ledger.excluded == (Exclusion("b/c.png", "not in the table", "table.parquet does not name it"),)
    assert ledger.notes == (
        Note("gone", "named by table.parquet, but not there"),
        Note("gone too", "named by table.parquet, but not there"),
    )
    [warning] = [event.text for event in tables.told if isinstance(event, Notice)]
    assert "2 pictures that table.parquet names are not in" in warning


def test_a_changed_table_is_read_anew_and_files_are_not(tables, monkeypatch):
    tables.write({"id": ["a", "d"], "caption": ["ape", "dog"]})
    tables.open()
    monkeypatch.setattr(Folder, "measure", lambda store, file: {"b/c.png": (256, 256)}[file])
    tables.write({"id": ["a", "b/c", "d"], "caption": ["ape", "cow", "the dog"]})
    assert captions(tables.open()) == {"a.png": ("ape",), "b/c.png": ("cow",), "d.png": ("the dog",)}


def test_the_last_manifest_is_not_taken_for_another_column(tables):
    tables.write({"id": ["a", "b/c", "d"], "caption": ["ape", "cow", "dog"], "tags": ["x", "y", "z"]})
    tables.open()
    assert captions(tables.open(skip="metadata"))["a.png"] == ("ape",)
    assert captions(tables.open(skip="metadata", caption_column="tags"))["a.png"] == ("x",)


def test_a_tables_captions_are_not_left_behind_for_another_strategy(tables):
    tables.write({"id": ["a", "b/c", "d"], "caption": ["ape", "cow", "dog"]})
    tables.open()
    assert "3 of 3 pictures have no caption" in tables.refused(strategy="textfile")
    assert captions(tables.open(strategy="filename"))["d.png"] == ("d",)


def test_missing_captions_are_told_with_their_table(tables):
    tables.write({"id": ["a", "b/c", "d"], "caption": ["ape", " ", None]})
    error = tables.refused()
    assert "2 of 3 pictures have no caption: b/c.png, d.png" in error
    assert "wants a text in each picture's row" in error
    assert "table.parquet: caption says none" in error


def test_a_table_that_is_no_use_is_one_clear_error(tables):
    tables.write({"id": [], "caption": []})
    assert "has no row" in tables.refused()
    tables.write({"idd": ["a"], "captions": ["x"]})
    error = tables.refused()
    assert "has no column `id` (filename_column) and `caption` (caption_column)." in error
    assert "its columns: idd, captions." in error
    assert 'perhaps "filename_column": "idd", "caption_column": "captions".' in error
    tables.write({"id": ["x", "y"], "caption": ["x", "y"]})
    assert "correct `filename_column` or `identifier_includes_extension`" in tables.refused()
    (tables.path / "table.parquet").write_bytes(b"no table")
    assert "cannot be read" in tables.refused()
    (tables.path / "table.jsonl").write_text("no table")
    assert "cannot be read" in tables.refused(table="table.jsonl")
    tables.write({"id": ["a"], "caption": [{"x": 1}]})
    assert "cannot be read" in tables.refused()


def test_a_column_of_json_lines_may_begin_with_a_megabyte_of_nothing(tables):
    rows = [{"id": f"none {number:010}", "caption": None} for number in range(30_000)] + [{"id": "a", "caption": "ape"}]
    (tables.path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert captions(tables.open(table="table.jsonl")) == {"a.png": ("ape",)}
