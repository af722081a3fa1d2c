"""The gallery on two ranks, which are threads here; `tests/contracts/test_two_ranks.py` has it on processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPModel

from simpletuner.errors import DataError, RunError
from simpletuner.evaluation.gallery import Gallery
from simpletuner.evaluation.names import file_name
from simpletuner.events import Event, Measured, Notice, Painted, Progress
from simpletuner.families.base import Shot
from tests.evaluation.gallery_fakes import SHOT, THREE, trainer_of
from tests.tiny_clip import judged


class Meeting:
    """A rank of two threads."""

    device = "cpu"
    ranks = 2

    def __init__(self, rank: int, barrier: threading.Barrier, table: list[str]) -> None:
        self.rank, self._barrier, self._table = rank, barrier, table

    def seed(self, seed: int) -> None:
        """Threads share one generator."""

    def attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = json.dumps(value)
        self._barrier.wait()
        answers = [json.loads(text) for text in self._table]
        self._barrier.wait()
        return answers


@dataclass
class Rank:
    """A process of a run, as far as a gallery sees it, and its watchers."""

    trainer: Any
    job: Gallery
    told: list[Event]

    @property
    def painted(self) -> list[str]:
        return [cond for _, cond, _ in self.trainer.family.sampled]

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]


@pytest.fixture
def two_ranks(gallery: Callable[..., Gallery]) -> Callable[..., tuple[Rank, Rank]]:
    """Two processes with a gallery each, as threads."""

    def of(shots: tuple[Shot, ...], **options: Any) -> tuple[Rank, Rank]:
        barrier, table = threading.Barrier(2, timeout=20), ["", ""]
        found = []
        for rank in range(2):
            told: list[Event] = []
            trainer = trainer_of(told, Meeting(rank, barrier, table))
            found.append(Rank(trainer, gallery(shots, **options), told))
        return found[0], found[1]

    return of


@pytest.fixture
def one_load_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.23 takes `tie_weights` from all its classes while one loads; two threads at once leave it so for good."""
    load, lock = CLIPModel.from_pretrained, threading.Lock()

    def loaded(*words: Any, **options: Any) -> Any:
        with lock:
            return load(*words, **options)

    monkeypatch.setattr(CLIPModel, "from_pretrained", loaded)


def run_all(ranks: Sequence[Rank]) -> None:
    """All at once; what one raises is raised."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        for done in [pool.submit(rank.job.run, rank.trainer) for rank in ranks]:
            done.result()


def test_each_rank_paints_its_share_and_all_of_it_is_told_in_order(
    two_ranks: Callable[..., tuple[Rank, Rank]], tmp_path: Path
) -> None:
    first, second = two_ranks(THREE, disable_benchmark=True, validation_on_startup=True)
    run_all([first, second])
    assert (first.painted, second.painted) == (["cond:cat 0", "cond:cat 2"], ["cond:cat 1"])
    assert [event.path for event in first.of(Painted)] == [tmp_path / "validation" / file_name(shot, 0) for shot in THREE]
    assert all(event.path.is_file() for event in first.of(Painted))
    assert [(event.done, event.total) for event in first.of(Progress)] == [(0, 3), (2, 3), (3, 3)]
    assert all(shot.nickname in (tmp_path / "gallery.html").read_text() for shot in THREE)


def test_a_rank_without_a_shot_loads_nothing_and_goes_on(two_ranks: Callable[..., tuple[Rank, Rank]]) -> None:
    first, second = two_ranks((SHOT,), validation_on_startup=True)
    second.trainer.family.sampler = second.trainer.family.image_decoder = None
    run_all([first, second])
    assert (len(first.painted), second.painted) == (2, [])


def test_ranks_share_out_what_is_missing_as_the_first_of_them_finds_it(
    two_ranks: Callable[..., tuple[Rank, Rank]], gallery: Callable[..., Gallery], tmp_path: Path
) -> None:
    """The second looks at a disk where nothing is painted, as one may that has an old view of a shared folder."""
    options = {"disable_benchmark": True, "validation_on_startup": True}
    run_all(two_ranks(THREE, **options))
    for shot in THREE[1:]:
        (tmp_path / "validation" / file_name(shot, 0)).unlink()
    first, second = two_ranks(THREE, **options)
    second.job = gallery(THREE, output_dir=str(tmp_path / "another view"), **options)
    run_all([first, second])
    assert (first.painted, second.painted) == (["cond:cat 1"], ["cond:cat 2"])


def test_with_previews_the_first_rank_paints_alone(two_ranks: Callable[..., tuple[Rank, Rank]]) -> None:
    """Frames are told while a picture is made, and only the first rank has watchers."""
    ranks = two_ranks(THREE, disable_benchmark=True, validation_on_startup=True, validation_preview=True)
    for rank in ranks:
        rank.trainer.family.preview_decoder = lambda device: nullcontext()
        rank.trainer.family.sampler_steps = lambda shot: shot.steps
    run_all(ranks)
    assert [len(rank.painted) for rank in ranks] == [3, 0]


def test_a_rank_that_fails_stops_the_others(two_ranks: Callable[..., tuple[Rank, Rank]]) -> None:
    first, second = two_ranks(THREE, disable_benchmark=True, validation_on_startup=True)

    def fail(device: str) -> Any:
        raise DataError("The decoder is cut short.")

    second.trainer.family.image_decoder = fail
    with pytest.raises(RunError, match=r"Process 1 of 2 stopped: The decoder is cut short\."):
        run_all([first, second])


def test_pictures_that_any_rank_could_not_write_are_named_in_order_and_scored_all_the_same(
    two_ranks: Callable[..., tuple[Rank, Rank]], tmp_path: Path, tiny_clip: Path, one_load_at_a_time: None
) -> None:
    (tmp_path / "validation").write_text("a file where the folder should be")
    judge = {"evaluation_type": "clip", "pretrained_evaluation_model_name_or_path": str(tiny_clip)}
    ranks = two_ranks(THREE, disable_benchmark=True, validation_on_startup=True, **judge)
    run_all(ranks)
    (warning,) = (notice.text for notice in ranks[0].of(Notice))
    assert ", ".join(file_name(shot, 0) for shot in THREE) in warning
    (measured,) = ranks[0].of(Measured)
    scores = [judged(tiny_clip, Image.new("RGB", (64, 32), (200, 0, 0)), shot.prompt) for shot in THREE]
    assert measured.figures["clip_score/mean"] == pytest.approx(sum(scores) / 3, abs=1e-3)
    (tmp_path / "validation").unlink()
    for rank in ranks:
        rank.trainer.state.step = 10
    run_all(ranks)
    assert [event.path.name for event in ranks[0].of(Painted)] == [file_name(shot, step) for step in (0, 10) for shot in THREE]
