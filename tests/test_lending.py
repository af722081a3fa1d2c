"""Pictures that prove unreadable while training are told once, whichever process met them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from simpletuner.config.datasets import ImageDataset
from simpletuner.config.run import Run
from simpletuner.data.index import open_dataset
from simpletuner.data.keep import Memory
from simpletuner.data.live import LiveLatents
from simpletuner.data.samples import LatentSpec, Recipe
from simpletuner.events import Event, Notice
from simpletuner.lending import FaultReport

SPEC = LatentSpec(channels=3, cell_px=8, alignment_px=32, native_edge_px=64)


class OtherRankToo:
    """The first of two processes: the other one tells what it has met as well."""

    rank, ranks = 0, 2

    def __init__(self, theirs: list[Any]) -> None:
        self.theirs = theirs

    def gather(self, value: Any) -> list[Any]:
        theirs = [None, None] if value == [None, None] else self.theirs  # what `together` asks
        return [json.loads(json.dumps(value)), theirs]


def test_bad_pictures_of_all_processes_are_told_and_noted(make_run: Callable[..., Run], tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (64, 64), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    raw = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(raw[: len(raw) // 2])
    entry = ImageDataset(id="cats", instance_data_dir=str(tmp_path), cache_dir_vae=str(tmp_path / "cache"), vae_batch_size=1)
    images = open_dataset(entry, SPEC, tell=lambda event: None)
    run = make_run("sana", output_dir=str(tmp_path / "out"))
    with ThreadPoolExecutor(1) as pool:
        store = LiveLatents(
            images,
            Recipe("pixels", {}),
            lambda pixels_B3HW, keys: pixels_B3HW,
            torch.float32,
            keep=Memory(),
            pool=pool,
            tell=lambda event: None,
        )
        assert store.fetch([1]).samples == (2,)
    told: list[Event] = []
    engine = OtherRankToo([[0, "damaged", "", 2], [1, "damaged", "here too", 2]])
    report = FaultReport(run, [images], [store])
    trainer: Any = SimpleNamespace(engine=engine, tell=told.append)
    report.run(trainer)
    account = json.loads((tmp_path / "out" / "ledger.json").read_text())["datasets"]["cats"]
    engine.theirs = []
    (tmp_path / "out" / "ledger.json").unlink()
    report.run(trainer)
    assert not (tmp_path / "out" / "ledger.json").exists(), "nothing new is nothing to write"
    assert [event.text.partition(":")[2].partition(":")[0] for event in told if isinstance(event, Notice)] == [
        " a.png is unreadable",
        " b.png is unreadable",
    ]
    assert [note["file"] for note in account["notes"]] == ["a.png", "b.png"]
    assert account["found"] == account["used"] == 3
