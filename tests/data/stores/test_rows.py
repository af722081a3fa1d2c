"""A dataset of the `datasets` library as a store, built here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.samples import LatentSpec
from simpletuner.data.stores.rows import Rows
from simpletuner.errors import DataError

LATENT = LatentSpec(channels=32, cell_px=32, alignment_px=64, native_edge_px=256)


def jpeg(size: tuple[int, int], orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(file, "JPEG", exif=exif)
    return file.getvalue()


RAW = [jpeg((256, 256)), jpeg((512, 256), orientation=6), b"no picture", jpeg((256, 300))]
CELLS = [{"bytes": raw, "path": f"fox_{number}.jpg" if number else None} for number, raw in enumerate(RAW)]
CAPTIONS = [["a fox", "an animal"], ["a hen"], ["x"], ["a cow"]]


def built(captions: list[Any] = CAPTIONS) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": CELLS, "caption": captions}).cast_column("image", datasets.Image())


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def opened(path: Path, **keys: Any) -> ImageSet:
    said = {"type": "huggingface", "dataset_name": str(path / "made"), "caption_strategy": "huggingface", **keys}
    return open_dataset(ImageDataset(id="cats", cache_dir_vae=str(path / "cache"), **said), LATENT, tell=lambda event: None)


def refused(path: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(path, **keys)
    return str(caught.value)


def as_parquet(path: Path) -> None:
    (path / "made").mkdir()
    built().to_parquet(path / "made" / "train.parquet")


@pytest.mark.parametrize(
    "make",
    [lambda path: built().save_to_disk(path / "made"),
     lambda path: datasets.DatasetDict(train=built()).save_to_disk(path / "made"),
     as_parquet],
    ids=["saved", "saved with splits", "folder of parquet"],
)  # fmt: skip
def test_rows_are_pictures_with_their_own_bytes_and_captions(tmp_path, make):
    make(tmp_path)
    images = opened(tmp_path)
    assert [images.file(sample) for sample in range(3)] == ["00000000/", "00000001/fox_1.jpg", "00000003/fox_3.jpg"]
    assert [images.captions(sample) for sample in range(3)] == [("a fox", "an animal"), ("a hen",), ("a cow",)]
    assert [images.read(sample) for sample in range(3)] == [RAW[0], RAW[1], RAW[3]]
    assert images.place(1).original_WH == (256, 512), "turned by its EXIF, as every store's pictures are"
    assert images.ledger.summary == "cats: 4 found = 3 used + 1 excluded (1 not a picture)"


def test_a_folder_of_pictures_with_metadata_is_one_too(tmp_path):
    (tmp_path / "made/train").mkdir(parents=True)
    (tmp_path / "made/train/fox.jpg").write_bytes(RAW[0])
    (tmp_path / "made/train/metadata.jsonl").write_text('{"file_name": "fox.jpg", "text": "a red fox"}\n')
    images = opened(tmp_path, caption_column="text")
    assert images.captions(0) == ("a red fox",)
    assert images.read(0) == RAW[0]
    assert opened(tmp_path, caption_strategy="filename").captions(0) == ("fox",)


def test_a_second_start_reads_no_picture_until_the_dataset_changes(tmp_path, monkeypatch):
    built().save_to_disk(tmp_path / "made")
    opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "read", None)
        assert len(opened(tmp_path)) == 3
    datasets.Dataset.from_dict(built()[:1]).save_to_disk(tmp_path / "other")
    (tmp_path / "made").rename(tmp_path / "former")
    (tmp_path / "other").rename(tmp_path / "made")
    assert len(opened(tmp_path)) == 1


def test_a_row_without_a_picture_is_in_the_ledger(tmp_path):
    cells = datasets.Dataset.from_dict({"image": [CELLS[0], None], "caption": ["a fox", "x"]})
    cells.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "made")
    [excluded] = opened(tmp_path).ledger.excluded
    assert (excluded.file, excluded.reason, excluded.detail) == ("00000001/", "empty row", "its image is null")


def test_a_dataset_that_is_no_use_is_one_clear_error(tmp_path):
    datasets.DatasetDict(train=built([1, 2, 3, 4]).add_column("text", CAPTIONS)).save_to_disk(tmp_path / "made")
    assert "its columns: image, caption, text." in refused(tmp_path, image_column="imag", caption_column="captio")
    assert 'perhaps "image_column": "image"' in refused(tmp_path, image_column="imag")
    assert "its splits: train." in refused(tmp_path, split="test")
    assert "cannot be opened" in refused(tmp_path, dataset_name="nobody/nothing")
    built().save_to_disk(tmp_path / "one")
    assert "has no split `test`" in refused(tmp_path, dataset_name=str(tmp_path / "one"), split="test")


@pytest.mark.parametrize(
    ("cells", "said"),
    [([], "cannot be opened"), ([1], "the column `image`"), ([[CELLS[0]]], "the column `image`")],
    ids=["no row", "numbers", "lists"],
)
def test_a_dataset_without_pictures_is_one_clear_error(tmp_path, cells, said):
    datasets.Dataset.from_dict({"image": cells}).save_to_disk(tmp_path / "made")
    assert said in refused(tmp_path, caption_strategy="filename")


def test_a_folder_with_a_script_is_one_clear_error(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "made.py").write_text("")
    assert "scripts are no longer supported" in refused(tmp_path)
