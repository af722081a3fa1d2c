"""Masks: paired by path and name, cut as their pictures are, reduced by area; what does not fit is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.data import masks as masks_module
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.masks import MaskStore, fill_masks, find_masks
from simpletuner.data.pixels import Unreadable, read_mask
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import LatentSpec, Place
from simpletuner.errors import DataError
from simpletuner.events import Event, Notice

SPEC = LatentSpec(channels=4, cell_px=8, alignment_px=32, native_edge_px=64)
SIZE = (128, 96)


def painted(path: Path, size: tuple[int, int], *boxes: tuple[int, int, int, int], mode: str = "L") -> Path:
    """Black, with white boxes (left, top, right, bottom)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size)
    for box in boxes:
        image.paste(255, box)
    image.convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "deep/c"):
        painted(tmp_path / "pictures" / f"{name}.png", SIZE, (0, 0, 50, 50), mode="RGB")
        painted(tmp_path / "masks" / f"{name}.png", SIZE, (0, 0, 64, 96))
    return tmp_path


def opened(folder: Path, **keys: Any) -> ImageSet:
    entry = ImageDataset(
        id="cats", instance_data_dir=str(folder / "pictures"), cache_dir_vae=str(folder / "cache"), resolution=64, **keys
    )
    images = open_dataset(entry, SPEC, tell=lambda event: None)
    images.pair(find_masks(ConditioningDataset(id="masks", instance_data_dir=str(folder / "masks"))))
    return images


def filled(images: ImageSet) -> tuple[MaskStore, list[Event]]:
    told: list[Event] = []
    store = fill_masks(images, SPEC, ranks=Alone(), tell=told.append)
    assert store is not None
    return store, told


def test_a_mask_is_that_of_the_same_path_whatever_the_ending(folder: Path) -> None:
    (folder / "masks" / "a.png").rename(folder / "masks" / "a.webp")
    images = opened(folder)
    assert images.masks is not None
    assert [images.masks.of(images.file(n)).file for n in range(3)] == ["a.webp", "b.png", "deep/c.png"]  # type: ignore[union-attr]


def test_a_picture_without_a_mask_is_left_out_and_a_mask_without_a_picture_noted(folder: Path) -> None:
    (folder / "masks" / "b.png").rename(folder / "masks" / "x.png")
    ledger = opened(folder).ledger
    assert [(one.file, one.reason) for one in ledger.excluded] == [("b.png", "no mask")]
    assert [(one.file, one.note) for one in ledger.notes] == [("x.png", "a mask of masks without a picture")]
    assert ledger.summary == "cats: 3 found = 2 used + 1 excluded (1 no mask)"
    painted(folder / "masks" / "b.png", SIZE)
    assert not opened(folder).ledger.excluded, "nothing of it was remembered"


def test_masks_that_fit_no_picture_at_all_are_an_error_with_its_mend(folder: Path) -> None:
    for mask in (folder / "masks").rglob("*.png"):
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    with pytest.raises(DataError, match=r"(?s)no images detected in dataset cats.*no mask.*add masks, of the same paths"):
        opened(folder)


def test_two_masks_of_one_picture_are_an_error(folder: Path) -> None:
    painted(folder / "masks" / "a.bmp", SIZE)
    with pytest.raises(DataError, match=r"a.bmp and a.png are masks of the same picture"):
        opened(folder)


def test_a_mask_is_cut_with_its_picture_and_reduced_by_area(folder: Path) -> None:
    """The picture of 128x96 is scaled to 85x64 and cut from column 10 to 64x64: the mask's edge at 64 of 128 goes to 32.5."""
    painted(folder / "masks" / "b.png", SIZE, (0, 0, 70, 96))  # to 36.5
    store, _ = filled(opened(folder, crop=True, crop_style="center"))
    half, more = store.get(0), store.get(1)
    assert (half.shape, half.dtype) == ((1, 8, 8), torch.float32)
    assert torch.allclose(half, torch.tensor([1, 1, 1, 1, 0.5 / 8, 0, 0, 0]).expand(1, 8, 8), atol=0.01)
    assert torch.allclose(more, torch.tensor([1, 1, 1, 1, 4.5 / 8, 0, 0, 0]).expand(1, 8, 8), atol=0.01)


def test_a_mask_follows_a_random_crop(folder: Path) -> None:
    """White where the picture is white: cut alike, both show the same shares."""
    boxes = [(0, 0, 30, 96), (80, 0, 110, 96)]
    painted(folder / "pictures" / "a.png", SIZE, *boxes, mode="RGB")
    painted(folder / "masks" / "a.png", SIZE, *boxes)
    images = opened(folder, crop=True, crop_style="random")
    from simpletuner.data.pixels import read_pixels

    grey = (read_pixels(images.read(0), images.place(0))[:1] + 1) / 2
    expected = torch.nn.functional.avg_pool2d(grey[None], 8)[0]
    assert torch.allclose(filled(images)[0].get(0), expected, atol=1e-5)


def test_a_smaller_mask_of_the_same_shape_serves_as_well(folder: Path) -> None:
    whole = filled(opened(folder))[0].get(0)
    painted(folder / "masks" / "a.png", (64, 48), (0, 0, 32, 48))
    assert torch.allclose(filled(opened(folder))[0].get(0), whole, atol=0.05)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_gives_its_first_channel(tmp_path: Path, mode: str) -> None:
    path = painted(tmp_path / "mask.tif", SIZE, (0, 0, 64, 96))
    if mode == "I;16":
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
    else:
        Image.open(path).convert(mode).save(path)
    mask = read_mask(path.read_bytes(), Place(SIZE, SIZE, (0, 0), SIZE))
    assert mask.shape == (1, 96, 128)
    assert (mask[0, :, :64].unique().tolist(), mask[0, :, 64:].unique().tolist()) == ([1.0], [0.0])


def test_what_is_hidden_by_transparency_counts_as_it_is_painted(tmp_path: Path) -> None:
    Image.new("RGBA", SIZE, (0, 255, 255, 0)).save(tmp_path / "mask.png")
    mask = read_mask((tmp_path / "mask.png").read_bytes(), Place(SIZE, SIZE, (0, 0), SIZE))
    assert not mask.any(), "red is 0, and white is laid under nothing"


def test_a_mask_of_another_shape_is_no_mask_of_the_picture(tmp_path: Path) -> None:
    raw = painted(tmp_path / "mask.png", (96, 96)).read_bytes()
    with pytest.raises(Unreadable, match="of another shape: 96x96, its picture is 128x96"):
        read_mask(raw, Place(SIZE, SIZE, (0, 0), SIZE))


def test_bad_masks_are_left_out_with_their_pictures_and_the_rest_goes_on(folder: Path) -> None:
    (folder / "masks" / "a.png").write_bytes(b"no picture")
    painted(folder / "masks" / "b.png", (10, 90))
    images = opened(folder)
    _, told = filled(images)
    excluded = [(one.file, one.reason) for one in images.ledger.excluded]
    assert excluded == [("a.png", "mask not a picture"), ("b.png", "mask of another shape")]
    [warning] = [event.text for event in told if isinstance(event, Notice)]
    assert warning == "cats: left out: a.png (mask not a picture), b.png (mask of another shape)"


def test_empty_masks_are_reported_at_every_start(folder: Path) -> None:
    painted(folder / "masks" / "b.png", SIZE)
    for _ in range(2):
        images = opened(folder)
        _, told = filled(images)
        notes = [(one.file, "black" in one.note) for one in images.ledger.notes if "mask" in one.note]
        assert notes == [("b.png", True)]
        assert [event.text for event in told if isinstance(event, Notice)] == [
            "cats: these count for nothing, since their masks are black there: b.png"
        ]


def test_masks_are_read_once_and_again_when_they_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Place] = []

    def noting(raw: bytes, place: Place) -> torch.Tensor:
        reads.append(place)
        return read_mask(raw, place)

    monkeypatch.setattr(masks_module, "read_mask", noting)
    filled(opened(folder))
    filled(opened(folder))
    assert len(reads) == 3
    painted(folder / "masks" / "deep" / "c.png", SIZE, (0, 0, 128, 96))
    store, _ = filled(opened(folder))
    assert len(reads) == 4
    assert store.get(2).min() == 1
    filled(opened(folder, crop=True, crop_style="corner"))
    assert len(reads) == 7, "another cut is another mask"
