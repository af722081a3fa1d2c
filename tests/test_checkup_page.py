"""The page: everything of the user's is escaped, nothing comes from elsewhere, and crops are those that are trained on."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.checkup import Report
from simpletuner.checkup_page import page, write_page
from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.config.run import Run
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.masks import find_masks
from simpletuner.data.pixels import read_pixels
from simpletuner.data.samples import LatentSpec
from simpletuner.errors import Problem, UserError
from simpletuner.estimates import Memory, Stage
from simpletuner.preflight import Length, bucket_table, plan_of

SPEC = LatentSpec(channels=4, cell_px=8, alignment_px=32, native_edge_px=64)
NASTY = "<script>alert(\"1\")</script> & 'friends'"
STAGE = Stage("training", 1, 1)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    folder = tmp_path / "cats"
    folder.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (4, 4 + 4 * (number % 2), 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64 + 64 * (number % 2), 64)).save(folder / f"{number} <i>.png")
        (folder / f"{number} <i>.txt").write_text(f"{NASTY}\nanother {number}\n")
    (folder / "bad <u>.png").write_bytes(b"nothing")
    entry = ImageDataset(
        id="cats <s>", instance_data_dir=str(folder), caption_strategy="textfile", cache_dir_vae=str(tmp_path / "cache"),
        resolution=64,
    )  # fmt: skip
    return open_dataset(entry, SPEC, tell=lambda event: None)


@pytest.fixture
def report(make_run: Callable[..., Run], images: ImageSet) -> Report:
    plan = plan_of(make_run("sana", train_batch_size=3), [images])
    return Report(
        ledgers={images.entry.id: images.ledger.as_dict()}, buckets={images.entry.id: bucket_table(plan.sets[0])},
        length=Length(10, 2, 5), pictures=["validation 64x64"], prompts={"anime <token>": NASTY}, caches=[],
        memory=Memory((STAGE,), STAGE, is_shared=True), rooms=[], writings=[], downloads=[], endpoint="", resumes_at=0,
        warnings=[f"beware of {NASTY}"], problems=[Problem("", NASTY)],
    )  # fmt: skip


class Reader(HTMLParser):
    """What a browser would find: tags, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(document: str) -> Reader:
    reader = Reader()
    reader.feed(document)
    return reader


def test_captions_names_and_prompts_are_text_and_nothing_comes_from_elsewhere(report: Report, images: ImageSet) -> None:
    document = page(report, [images])
    found = read(document)
    assert not found.tags & {"script", "i", "u", "s", "link", "iframe", "token"}
    assert found.text.count(NASTY) == 4 + 1 + 1 + 1, "captions, prompt, warning, problem"
    for text in (
        "0 <i>.png",
        "bad <u>.png",
        "not a picture",
        "cats <s>",
        "anime <token>",
        "another 3",
        "5 found = 4 used + 1 left out",
    ):
        assert text in found.text, text
    assert len(found.addresses) == 4
    assert all(address.startswith("data:image/jpeg;base64,") for address in found.addresses)
    assert not re.search(r"https?:|@import|url\(", document)


def test_the_histogram_shows_each_bucket_with_its_pictures_and_top_ups(report: Report, images: ImageSet) -> None:
    document = page(report, [images])
    text = read(document).text
    assert "64×64" in text
    assert text.count("+1 again") == 2
    assert document.count("width:100.0%") == 2


def test_a_crop_is_the_picture_as_it_is_trained_on(report: Report, images: ImageSet) -> None:
    shown = [
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        for address in read(page(report, [images])).addresses
    ]
    order = sorted(range(4), key=lambda sample: images.bucket_ids[sample])
    for sample, picture in zip(order, shown, strict=True):
        pixels_3HW = (read_pixels(images.read(sample), images.place(sample)) + 1) * 127.5
        assert picture.size == images.buckets[images.bucket_ids[sample]]
        difference = np.asarray(picture, np.float32) - pixels_3HW.permute(1, 2, 0).numpy()
        assert np.abs(difference).mean() < 6


def test_a_file_that_proves_unreadable_is_shown_as_such(report: Report, images: ImageSet) -> None:
    path = Path(images.store.root) / images.file(1)
    path.write_bytes(path.read_bytes()[:60])
    found = read(page(report, [images]))
    assert len(found.addresses) == 3
    assert "damaged" in found.text


def test_the_page_is_never_written_among_the_pictures(report: Report, images: ImageSet, tmp_path: Path) -> None:
    before = sorted(Path(images.store.root).iterdir())
    with pytest.raises(UserError, match="in the folder of dataset `cats <s>`"):
        write_page(report, [images], Path(images.store.root) / "sub" / "report.html")
    assert sorted(Path(images.store.root).iterdir()) == before
    write_page(report, [images], tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text() == page(report, [images])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_page(report, [images], tmp_path / "file" / "report.html")


def test_the_report_needs_a_file_name(capsys: Any) -> None:
    from simpletuner.cli import main

    assert main(["check", "--report", "--json"]) == 2
    assert "`--report` needs a value" in capsys.readouterr().err


def test_what_counts_by_its_mask_is_bright_and_the_rest_is_dark(report: Report, images: ImageSet, tmp_path: Path) -> None:
    for sample in range(4):
        width, height = images.place(sample).original_WH
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width, height // 2))
        path = tmp_path / "masks" / images.file(sample)
        path.parent.mkdir(exist_ok=True)
        mask.save(path)
    plain = shown(page(report, [images]))
    images.pair(find_masks(ConditioningDataset(id="masks <b>", instance_data_dir=str(tmp_path / "masks"))))
    document = page(report, [images])
    assert "masks <b>" in read(document).text
    for before, after in zip(plain, shown(document), strict=True):
        rows = before.shape[0] // 2
        assert np.abs(after[: rows - 8] - before[: rows - 8]).mean() < 6
        assert after[rows + 8 :].mean() == pytest.approx(0.2 * before[rows + 8 :].mean(), rel=0.15)
    with pytest.raises(UserError, match="in the folder of dataset `masks <b>`"):
        write_page(report, [images], tmp_path / "masks" / "report.html")


def shown(document: str) -> list[np.ndarray]:
    """The crops of a page."""
    raws = [base64.b64decode(address.partition(",")[2]) for address in read(document).addresses]
    return [np.asarray(Image.open(io.BytesIO(raw)), np.float32) for raw in raws]


def test_a_set_to_judge_by_is_shown_as_such_and_many_alternatives_are_counted(report: Report, images: ImageSet) -> None:
    report.ledgers[images.entry.id]["dataset_type"] = "eval"
    text = read(page(report, [images])).text
    assert "Judged by, and never trained on." in text
    assert "As they are judged" in text
    assert re.search(r"0\s*pictures", text), "of those that are trained on"
    (Path(images.store.root) / "0 <i>.txt").write_text("\n".join(f"<em>{number}</em>" for number in range(20)))
    again = open_dataset(images.entry, SPEC, tell=lambda event: None)
    text = read(page(report, [again])).text
    assert "<em>7</em>" in text
    assert "<em>8</em>" not in text
    assert "and 12 more" in text


def test_the_page_is_not_written_into_a_dataset_of_files(report: Report, images: ImageSet, tmp_path: Path) -> None:
    images.entry = images.entry.model_copy(update={"instance_data_dir": None, "dataset_name": str(tmp_path / "rows")})
    with pytest.raises(UserError, match="nothing is ever written"):
        write_page(report, [images], tmp_path / "rows" / "report.html")
