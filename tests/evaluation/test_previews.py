from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from simpletuner.config.run import Run
from simpletuner.evaluation.previews import Previews
from simpletuner.events import Event, Notice, Previewed
from simpletuner.families.base import Shot

SHOT = Shot("a/<cat>", 2, "a cat", "", 64, 32, seed=7, guidance=4.5, steps=20)


class Family:
    """Shows the latents' mean as red."""

    is_lent = False

    @contextmanager
    def preview_decoder(self, device: str) -> Iterator[Callable[[torch.Tensor], Image.Image]]:
        self.is_lent = True
        yield lambda latents: Image.new("RGB", (64, 32), (int(latents.mean()), 0, 0))
        self.is_lent = False

    def sampler_steps(self, shot: Shot) -> int:
        return 20


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def trainer(told: list[Event]) -> Any:
    return SimpleNamespace(family=Family(), engine=SimpleNamespace(device="cpu"), tell=told.append)


def sample(run: Run, trainer: Any) -> None:
    """What the sampler's hook does: told of twenty steps, one after another."""
    with Previews(run).lent(trainer, 7, "ema") as watch:
        on_step = watch(SHOT)
        assert on_step is not None
        for done in range(1, 21):
            on_step(done, torch.full((1, 1, 2, 2), float(done)))


def red(png: bytes | Path) -> int:
    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return image.convert("RGB").getpixel((0, 0))[0]


def test_of_twenty_steps_every_fifth_is_shown_and_the_newest_is_kept(
    make_run: Callable[..., Run], trainer: Any, told: list[Event], tmp_path: Path
) -> None:
    sample(make_run("sana", output_dir=str(tmp_path), validation_preview=True, validation_preview_steps=5), trainer)
    frames = [event for event in told if isinstance(event, Previewed)]
    assert [frame.inference_step for frame in frames] == [5, 10, 15, 20] == [red(frame.png) for frame in frames]
    [told_of] = {(frame.nickname, frame.prompt, frame.step, frame.inference_steps, frame.weights) for frame in frames}
    assert told_of == ("a/<cat>", "a cat", 7, 20, "ema")
    (name,) = os.listdir(tmp_path / "previews")
    assert red(tmp_path / "previews" / name) == 20
    assert not trainer.family.is_lent


def test_without_previews_nothing_is_loaded_and_no_step_is_watched(make_run: Callable[..., Run], trainer: Any) -> None:
    with Previews(make_run("sana")).lent(trainer, 7, "trained") as watch:
        assert not trainer.family.is_lent
        assert watch(SHOT) is None


def test_frames_that_cannot_be_kept_are_told_once_and_sent_all_the_same(
    make_run: Callable[..., Run], trainer: Any, told: list[Event], tmp_path: Path
) -> None:
    (tmp_path / "previews").touch()
    sample(make_run("sana", output_dir=str(tmp_path), validation_preview=True, validation_preview_steps=5), trainer)
    assert len([event for event in told if isinstance(event, Previewed)]) == 4
    assert len([event for event in told if isinstance(event, Notice)]) == 1
