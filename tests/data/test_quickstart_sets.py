"""The dataset files of the quickstarts, as printed there but for their folders: what becomes of pictures of real sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from simpletuner.config.load import build, parse
from simpletuner.config.run import Hardware, Run
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import LatentSpec
from simpletuner.errors import DataError
from simpletuner.events import Event, Notice
from simpletuner.families import find
from simpletuner.preflight import open_sets, plan_of
from tests.quickstarts import CASCADE_DATASETS, SANA_DATASETS, SD3_DATASETS

SANA = LatentSpec(channels=32, cell_px=32, alignment_px=64, native_edge_px=1024)
SD3 = LatentSpec(channels=16, cell_px=8, alignment_px=64, native_edge_px=1024)
CASCADE = LatentSpec(channels=16, cell_px=128 / 3, alignment_px=128, native_edge_px=1024, longest_aspect=2)


def run_of(folder: Path, family: str, datasets: str) -> Run:
    (folder / "sets.json").write_text(datasets)
    words = [f"model_family={family}", "data_backend_config=sets.json", "validation_prompt=a cat"]
    return build(parse(words, families=find(), environ={}, cwd=folder), Hardware())


def paint(folder: Path, *sizes: tuple[int, int]) -> None:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.new("L", size, number).save(folder / f"a_grey_{number}.png", compress_level=1)


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def places(images: ImageSet) -> list[tuple[int, int]]:
    return [images.place(sample).target_WH for sample in images.alive().tolist()]


def test_the_sana_pages_sets_share_a_folder_in_two_sizes_and_pass_as_often_as_written(tmp_path: Path) -> None:
    paint(tmp_path / "datasets" / "pseudo-camera-10k", (800, 600), (400, 300))
    paint(tmp_path / "datasets" / "dreambooth-subject", (1200, 1024), (800, 1400), (600, 600))
    run = run_of(tmp_path, "sana", SANA_DATASETS)
    regular, large, small = sets = open_sets(run, SANA, Alone(), lambda _: None)
    assert places(regular) == [(512, 512)]
    assert places(large) == [(1088, 960), (768, 1344)]
    assert places(small) == [(576, 448), (384, 704), (512, 512)]
    assert large.store.root == small.store.root
    assert len({images.cache_dir for images in sets}) == 3
    assert [one.reason for one in large.ledger.excluded] == ["below minimum_image_size"]
    assert [plan.passes for plan in plan_of(run, sets).sets] == [1, 1001, 1001]
    assert regular.entry.is_regularisation_data


def test_the_sd3_pages_set_takes_pictures_of_every_size(tmp_path: Path) -> None:
    paint(tmp_path / "datasets" / "pseudo-camera-10k", (3000, 2000), (200, 100), (16, 16))
    run = run_of(tmp_path, "sd3", SD3_DATASETS.replace("/home/user/simpletuner/", ""))
    told: list[Event] = []
    [images] = open_sets(run, SD3, Alone(), told.append)
    assert places(images) == [(1024, 1024)] * 3
    assert images.place(0).corner_XY == ((1536 - 1024) // 2, 0), "reduced, then cut from the middle"
    assert not any("skip_file_discovery" in event.text for event in told if isinstance(event, Notice))


def test_the_cascade_pages_set_goes_to_its_three_sizes_and_is_cut_at_random(tmp_path: Path) -> None:
    squares = [(1500, 1500)] * 8
    paint(tmp_path / "data", *squares, (1000, 1400), (2000, 1500), (700, 700))
    run = run_of(tmp_path, "stable_cascade", CASCADE_DATASETS.replace("/data/stable-cascade", "data"))
    told: list[Event] = []
    [images] = open_sets(run, CASCADE, Alone(), told.append)
    assert places(images) == [(1024, 1024)] * 8 + [(896, 1152), (1152, 896)]
    assert len({images.place(sample).corner_XY for sample in range(8)}) > 4
    assert [one.file for one in images.ledger.excluded] == ["a_grey_10.png"]
    assert not any("beyond" in event.text for event in told if isinstance(event, Notice))
    assert [plan.passes for plan in plan_of(run, [images]).sets] == [2]


def test_the_cascade_page_told_to_use_longer_sizes_is_warned(tmp_path: Path) -> None:
    paint(tmp_path / "data", (1800, 700), (1000, 1000))
    run = run_of(
        tmp_path, "stable_cascade", CASCADE_DATASETS.replace("/data/stable-cascade", "data").replace("1152x896", "1664x640")
    )
    told: list[Event] = []
    open_sets(run, CASCADE, Alone(), told.append)
    assert any("beyond 2:1" in event.text and "1664x640" in event.text for event in told if isinstance(event, Notice))


def test_an_empty_folder_of_the_subject_says_what_the_page_says_and_how_to_mend_it(tmp_path: Path) -> None:
    paint(tmp_path / "datasets" / "pseudo-camera-10k", (800, 600))
    paint(tmp_path / "datasets" / "dreambooth-subject")
    run = run_of(tmp_path, "sana", SANA_DATASETS)
    with pytest.raises(DataError) as caught:
        open_dataset(run.datasets[1], SANA, tell=lambda _: None)
    assert str(caught.value).startswith("no images detected in dataset dreambooth-subject: ")
    assert "Mend: put pictures into it, or correct instance_data_dir." in str(caught.value)
