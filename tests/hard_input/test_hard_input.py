"""Hard input: every row of the table has its outcome, the account adds up, and the user's folder stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.ledger import Exclusion
from simpletuner.data.pixels import measure, read_pixels
from simpletuner.data.precompute import LatentStore, fill_latents
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import LatentSpec, Place, Recipe
from simpletuner.events import Event, Notice
from tests.e2e.conftest import Workspace
from tests.hard_input.outcomes import CAPTIONS, CHANGES, PASSED_OVER, PICTURES, UNREADABLE, USED, Change, Row, Text, as_markdown
from tests.hard_input.pictures import COLOURS, encoded, exif, jpeg, quadrants, stored

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
SPEC = LatentSpec(channels=3, cell_px=8, alignment_px=32, native_edge_px=64)


class Shrink:
    """An image encoder whose latents are the picture, eight times smaller."""

    recipe = Recipe("shrink", {})

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        yield lambda pixels_BCHW, _keys: pixels_BCHW[..., 4::8, 4::8]


def opened(root: Path, **options: Any) -> ImageSet:
    keys = {"id": "hard", "instance_data_dir": str(root), "cache_dir_vae": str(root.parent / "cache"), **options}
    return open_dataset(ImageDataset(**keys), SPEC, tell=lambda event: None)


def filled(images: ImageSet, tell: Callable[[Event], None] = lambda event: None) -> LatentStore:
    return fill_latents([images], Shrink(), dtype="float32", device="cpu", ranks=Alone(), tell=tell)[0]


@dataclass(frozen=True)
class Outcome:
    """What became of the whole folder."""

    images: ImageSet
    latents: LatentStore
    samples: dict[str, int]
    """File -> sample, of those used."""
    excluded: dict[str, Exclusion]


@pytest.fixture(scope="module")
def hard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All hard files in one folder. Only to be read."""
    root = tmp_path_factory.mktemp("hard") / "pictures"
    for row in PICTURES:
        row.write(root)
    return root


@pytest.fixture(scope="module")
def outcome(hard_folder: Path) -> Outcome:
    images = opened(hard_folder)
    latents = filled(images)
    samples = {images.file(sample): sample for sample in images.alive().tolist()}
    return Outcome(images, latents, samples, {one.file: one for one in images.ledger.excluded})


@pytest.mark.parametrize("row", PICTURES, ids=lambda row: ascii(row.file[:40]))
def test_every_row_has_its_documented_outcome(row: Row, outcome: Outcome) -> None:
    if row.outcome == USED:
        assert row.file in outcome.samples, outcome.excluded.get(row.file)
    elif row.outcome == PASSED_OVER:
        assert row.file not in outcome.samples
        assert row.file not in outcome.excluded
    else:
        assert outcome.excluded[row.file].reason == row.outcome
        assert outcome.excluded[row.file].detail


@pytest.mark.parametrize(
    "row", [row for row in PICTURES if row.outcome == USED and row.colours], ids=lambda row: ascii(row.file[:40])
)
def test_every_used_picture_is_upright_whole_and_in_its_true_colours(row: Row, outcome: Outcome) -> None:
    sample = outcome.samples[row.file]
    place = outcome.images.place(sample)
    assert place.original_WH == row.size_WH
    pixels_CHW = read_pixels(outcome.images.read(sample), place)
    (width, height), latents_CHW = place.target_WH, outcome.latents.get(sample)
    assert pixels_CHW.shape == (3, height, width)
    assert latents_CHW.shape == (3, height // 8, width // 8)
    for picture_CHW in (pixels_CHW, latents_CHW):
        rows, columns = (picture_CHW.shape[1] // 4, picture_CHW.shape[2] // 4)
        seen = [picture_CHW[:, y, x] for y in (rows, 3 * rows) for x in (columns, 3 * columns)]
        for colour, wanted in zip(seen, row.colours, strict=True):
            assert np.abs((colour.numpy() + 1) * 127.5 - np.array(wanted)).max() <= row.tolerance


def test_found_is_used_plus_excluded_and_nobody_is_forgotten(outcome: Outcome) -> None:
    ledger = outcome.images.ledger
    assert ledger.found == ledger.used + len(ledger.excluded) == sum(row.outcome != PASSED_OVER for row in PICTURES)
    assert ledger.used == len(outcome.samples) == sum(row.outcome == USED for row in PICTURES)


def test_the_table_is_large_and_the_documentation_shows_it(hard_folder: Path) -> None:
    assert len({row.file for row in PICTURES}) == len(PICTURES) >= 40
    text = DOCUMENT.read_text(encoding="utf-8")
    assert as_markdown() in text, "print it with: python -c 'from tests.hard_input.outcomes import *; print(as_markdown())'"


def test_pictures_of_one_stem_keep_their_own_latents(outcome: Outcome) -> None:
    first, second = (outcome.latents.get(outcome.samples[name]) for name in ("twin.jpg", "twin.png"))
    assert (first - second).abs().max() > 0.5


def test_identical_pictures_are_encoded_once_and_noted(outcome: Outcome) -> None:
    noted = {note.file for note in outcome.images.ledger.notes if note.note.startswith("identical to ")}
    assert {"LOUD.JPG", "linked.jpg"} & noted
    keys = outcome.latents.keys
    assert keys[outcome.samples["LOUD.JPG"]] == keys[outcome.samples["linked.jpg"]]
    assert len(outcome.latents.cache.keys()) < len(outcome.samples)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_pixel_of_a_turned_picture_is_where_the_exif_standard_says(orientation: int, kind: str) -> None:
    scene = quadrants((48, 32))
    scene[:8, 8:16] = (128, 128, 128)  # no symmetry
    raw = encoded(stored(scene, orientation), kind, exif=exif(orientation))
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Path(file.name).write_bytes(raw)
        assert measure(file.name) == (48, 32)
    pixels_CHW = read_pixels(raw, Place((48, 32), (48, 32), (0, 0), (48, 32)))
    apart = np.abs((pixels_CHW.permute(1, 2, 0).numpy() + 1) * 127.5 - scene)
    assert apart.max() < (0.01 if kind == "PNG" else 32)
    assert apart.mean() < 2


@pytest.mark.parametrize("text", CAPTIONS, ids=lambda text: ascii(text.content[:16]))
def test_every_caption_file_has_its_documented_outcome(text: Text, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("a.jpg", "good.jpg"):
        (root / name).write_bytes(jpeg())
    (root / "a.txt").write_bytes(text.content)
    (root / "good.txt").write_text("good")
    images = opened(root, caption_strategy="textfile", caption_missing="skip")
    assert images.ledger.found == 2
    if text.captions:
        assert images.captions(0) == text.captions
        assert images.ledger.used == 2
    else:
        [excluded] = images.ledger.excluded
        assert (excluded.file, excluded.reason) == ("a.jpg", "no caption")
        assert text.detail in excluded.detail


def test_one_caption_file_serves_two_pictures_of_its_stem(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("a.jpg", "a.png", "a.b.jpg"):
        (root / name).write_bytes(jpeg())
    (root / "a.txt").write_text("a fox")
    (root / "a.b.txt").write_text("a hen")
    images = opened(root, caption_strategy="textfile")
    assert [(images.file(i), images.captions(i)) for i in range(3)] == [
        ("a.b.jpg", ("a hen",)),
        ("a.jpg", ("a fox",)),
        ("a.png", ("a fox",)),
    ]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.what)
def test_a_picture_that_changes_before_it_is_encoded_has_its_documented_outcome(change: Change, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (root / name).write_bytes(jpeg())
    images = opened(root)
    change.happen(root / "a.jpg")
    latents = filled(images)
    ledger = images.ledger
    assert ledger.found == 2 == ledger.used + len(ledger.excluded)
    if change.outcome == USED:
        assert images.alive().tolist() == [0, 1]
        colour = latents.get(0)[:, 1, 1].numpy()
        assert np.abs((colour + 1) * 127.5 - np.array(COLOURS[3])).max() < 6
    else:
        assert [(one.file, one.reason) for one in ledger.excluded] == [("a.jpg", change.outcome)]
    if change.outcome == "changed":
        again = opened(root)
        filled(again)
        assert again.ledger.used == 2


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who is not root; as root, by setting its rights aside for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may use; pytest's own are for their owner."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="simpletuner-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_what_a_user_may_not_read_has_its_documented_outcome(open_folder: Path) -> None:
    root = open_folder / "pictures"
    for row in UNREADABLE:
        row.write(root)
    (root / "fine.jpg").write_bytes(jpeg())
    filled(opened(root, cache_dir_vae=str(open_folder / "other")))  # whatever is imported late is imported now
    (root / "shut.jpg").chmod(0)
    (root / "shut").chmod(0)
    told: list[Event] = []
    try:
        with without_rights():
            entry = ImageDataset(id="hard", instance_data_dir=str(root), cache_dir_vae=str(open_folder / "cache"))
            images = open_dataset(entry, SPEC, tell=told.append)
            filled(images)
    finally:
        (root / "shut").chmod(0o755)
    ledger = images.ledger
    assert [(one.file, one.reason, one.detail) for one in ledger.excluded] == [
        ("shut.jpg", "cannot be opened", "Permission denied")
    ]
    assert (ledger.found, ledger.used) == (2, 1)
    assert [(note.file, note.note) for note in ledger.notes] == [("shut/", "folder not searched: Permission denied")]
    assert any("shut/" in event.text for event in told if isinstance(event, Notice) and event.level == "warning")


Snapshot = dict[str, tuple[Any, ...]]


def snapshot(root: Path) -> Snapshot:
    """Everything that could be touched below a folder: kinds, times, rights, targets of links, bytes."""
    found: Snapshot = {}
    for folder, folders, files in os.walk(root):
        for name in [".", *folders, *files]:
            path = Path(folder, name)
            facts = path.lstat()
            content = hashlib.sha256(path.read_bytes()).digest() if path.is_file() and not path.is_symlink() else b""
            target = os.readlink(path) if path.is_symlink() else ""
            found[str(path)] = (
                facts.st_mode,
                facts.st_ino,
                facts.st_size,
                facts.st_mtime_ns,
                facts.st_ctime_ns,
                target,
                content,
            )
    return found


def test_a_whole_training_run_on_the_hard_folder_ends_well_and_leaves_the_folder_as_it_was(
    hard_folder: Path, tmp_path: Path, tiny_repo: Callable[[str], Path]
) -> None:
    config = {
        "model_family": "sana",
        "pretrained_model_name_or_path": str(tiny_repo("sana")),
        "lora_rank": 4,
        "max_train_steps": 2,
        "train_batch_size": 2,
    }
    datasets = [{"id": "hard", "instance_data_dir": str(hard_folder), "resolution": 64, "crop": True}]
    workspace = Workspace(tmp_path, config, datasets)
    before = snapshot(hard_folder)
    said = workspace.run("train")
    assert snapshot(hard_folder) == before

    ledger = json.loads((tmp_path / "output" / "ledger.json").read_text(encoding="utf-8"))["datasets"]["hard"]
    found, used = (sum(row.outcome in outcomes for row in PICTURES) for outcomes in ({*KINDS}, {USED}))
    assert (ledger["found"], ledger["used"], len(ledger["excluded"])) == (found, used, found - used)
    assert {(one["file"], one["reason"]) for one in ledger["excluded"]} == {
        (row.file, row.outcome) for row in PICTURES if row.outcome not in (USED, PASSED_OVER)
    }
    assert f"hard: {found} found = " in said
    assert "Traceback" not in said


KINDS = {row.outcome for row in PICTURES} - {PASSED_OVER}
