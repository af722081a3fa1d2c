from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from simpletuner.evaluation.gallery import Gallery
from simpletuner.evaluation.names import file_name, is_painted
from simpletuner.events import Event, Measured, Notice, Painted
from simpletuner.families.base import Shot
from tests.evaluation.gallery_fakes import SHOT, THREE, FakeEngine, FakeFamily, trainer_of
from tests.tiny_clip import judged


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def trainer(told: list[Event]) -> Any:
    return trainer_of(told, FakeEngine())


def red(path: Path) -> int:
    with Image.open(path) as image:
        return image.convert("RGB").getpixel((0, 0))[0]


def test_the_base_s_pictures_come_before_the_first_step_and_the_gallery_later(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    job = gallery()
    job.run(trainer)
    assert not (tmp_path / "validation").exists()
    trainer.state.step = 10
    job.run(trainer)
    assert red(tmp_path / "benchmark" / "step_0_cat_0_64x32.png") == 10
    assert red(tmp_path / "validation" / "step_10_cat_0_64x32.png") == 200
    assert trainer.tuning.standing == "training"


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("none", {"step_0_cat_0_64x32.png": 200}),
        ("ema_only", {"step_0_cat_ema_0_64x32.png": 100}),
        ("comparison", {"step_0_cat_0_64x32.png": 200, "step_0_cat_ema_0_64x32.png": 100}),
    ],
)
def test_the_average_of_the_weights_paints_too_as_wished(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path, wish: str, expected: dict[str, int]
) -> None:
    job = gallery(disable_benchmark=True, validation_on_startup=True, use_ema=True, ema_validation=wish)
    job.run(trainer)
    assert {path.name: red(path) for path in (tmp_path / "validation").iterdir()} == expected
    assert trainer.tuning.standing == "training"


def test_a_picture_of_the_average_is_not_taken_for_one_of_the_newest_weights(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    gallery(disable_benchmark=True, validation_on_startup=True, use_ema=True, ema_validation="ema_only").run(trainer)
    path = tmp_path / "validation" / file_name(SHOT, 0, "ema")
    assert is_painted(path, SHOT, 0, "ema")
    assert not is_painted(path, SHOT, 0)


def test_the_gallery_shows_averaged_weights_and_the_base_s_pictures_are_its_own(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    class ScheduleFree:
        mode = "train"

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    modes = []

    class Watching(FakeFamily):
        @contextmanager
        def sampler(self, denoiser: Any, device: str) -> Iterator[Callable[..., torch.Tensor]]:
            modes.append((self.tuning.standing, trainer.optimizer.mode))
            with super().sampler(denoiser, device) as sample:
                yield sample

    trainer.optimizer, trainer.family = ScheduleFree(), Watching(trainer.tuning)
    gallery(validation_on_startup=True).run(trainer)
    assert modes == [("base", "train"), ("evaluating", "eval")]
    assert trainer.optimizer.mode == "train"


def test_cond_and_uncond_go_to_the_sampler(gallery: Callable[..., Gallery], trainer: Any) -> None:
    gallery((replace(SHOT, negative="blurry"),), disable_benchmark=True, validation_on_startup=True).run(trainer)
    assert trainer.family.sampled == [("evaluating", "cond:a cat", "uncond:blurry")]


def test_a_gallery_on_startup_and_no_benchmark_where_so_wished(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    gallery(disable_benchmark=True, validation_on_startup=True).run(trainer)
    assert (tmp_path / "validation" / "step_0_cat_0_64x32.png").is_file()
    assert not (tmp_path / "benchmark").exists()


def test_each_picture_is_told_once_it_is_there(
    gallery: Callable[..., Gallery], trainer: Any, told: list[Event], tmp_path: Path
) -> None:
    gallery(validation_on_startup=True).run(trainer)
    base, painted = (event for event in told if isinstance(event, Painted))
    assert base == Painted(tmp_path / "benchmark" / "step_0_cat_0_64x32.png", "cat", "a cat", 0, "base")
    assert painted == Painted(tmp_path / "validation" / "step_0_cat_0_64x32.png", "cat", "a cat", 0)


def test_nothing_is_painted_twice_at_one_step(gallery: Callable[..., Gallery], trainer: Any) -> None:
    job = gallery(disable_benchmark=True)
    job.run(trainer)
    trainer.state.step = 10
    job.run(trainer)
    job.run(trainer)
    assert len(trainer.family.sampled) == 1


def test_a_resumed_run_paints_only_what_is_missing_of_its_first_step(gallery: Callable[..., Gallery], trainer: Any) -> None:
    trainer.state.step = 10
    first = gallery(validation_on_startup=True)
    first.run(trainer)
    assert len(trainer.family.sampled) == 2
    dog = replace(SHOT, nickname="dog", index=1)
    gallery((SHOT, dog), validation_on_startup=True).run(trainer)
    assert len(trainer.family.sampled) == 4, "the base's picture and the gallery's of the dog"


def test_a_resumed_run_paints_what_a_killed_one_still_owed_at_that_step(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    for step in (9, 10):
        trainer.state.step = step
        gallery(disable_benchmark=True).run(trainer)
    assert os.listdir(tmp_path / "validation") == [file_name(SHOT, 10)], "only that of a step at the interval was owed"
    gallery(disable_benchmark=True).run(trainer)
    assert len(trainer.family.sampled) == 1, "what is there is not painted again"


def test_pictures_of_later_steps_are_painted_anew_after_a_resume(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    """They may come from weights that were thrown away: another learning rate from the last checkpoint on."""
    path = tmp_path / "validation" / file_name(SHOT, 20)
    trainer.state.step = 20
    gallery(disable_benchmark=True, validation_on_startup=True).run(trainer)
    Image.new("RGB", (64, 32), (1, 2, 3)).save(path, pnginfo=None)
    resumed = gallery(disable_benchmark=True)
    trainer.state.step = 10
    resumed.run(trainer)
    trainer.state.step = 20
    resumed.run(trainer)
    assert red(path) == 200


def test_a_changed_prompt_under_the_same_name_is_painted_anew(gallery: Callable[..., Gallery], trainer: Any) -> None:
    gallery().run(trainer)
    gallery((replace(SHOT, prompt="another cat"),)).run(trainer)
    assert [cond for _, cond, _ in trainer.family.sampled] == ["cond:a cat", "cond:another cat"]


def test_full_tuning_has_no_base_to_ask_after_its_first_step(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    trainer.tuning.keeps_base = False
    trainer.state.step = 10
    gallery().run(trainer)
    assert not (tmp_path / "benchmark").exists()


def test_a_run_that_ends_where_it_began_still_has_its_gallery(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    trainer.state.step, trainer.is_done = 10, True
    gallery().run(trainer)
    assert (tmp_path / "validation" / "step_10_cat_0_64x32.png").is_file()


def test_training_s_random_numbers_do_not_notice_a_gallery(gallery: Callable[..., Gallery], trainer: Any) -> None:
    before = torch.get_rng_state()
    gallery(validation_on_startup=True).run(trainer)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_picture_says_in_its_metadata_what_it_is(gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path) -> None:
    shot = replace(SHOT, nickname="chef_<token>", prompt="你好 😀\nsecond line")
    gallery((shot,), disable_benchmark=True, validation_on_startup=True).run(trainer)
    with Image.open(tmp_path / "validation" / "step_0_chef__token_0_64x32.png") as image:
        texts = dict(image.info)
    wanted = {"nickname": "chef_<token>", "prompt": "你好 😀\nsecond line", "seed": "7", "guidance": "4.5", "step": "0"}
    assert wanted.items() <= texts.items()


def test_every_shot_is_sampled_at_its_adapter_s_strength_and_says_so(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    strengths = []

    class Watching(FakeFamily):
        @contextmanager
        def sampler(self, denoiser: Any, device: str) -> Iterator[Callable[..., torch.Tensor]]:
            with super().sampler(denoiser, device) as sample:

                def noting(*arguments: Any) -> torch.Tensor:
                    strengths.append(self.tuning.strength)
                    return sample(*arguments)

                yield noting

    trainer.family = Watching(trainer.tuning)
    half = replace(SHOT, index=1, adapter_strength=0.5)
    gallery((SHOT, half), disable_benchmark=True, validation_on_startup=True).run(trainer)
    assert strengths == [1.0, 0.5]
    with Image.open(tmp_path / "validation" / file_name(half, 0)) as image:
        assert image.info["adapter_strength"] == "0.5"


def test_a_gallery_is_due_by_epochs_as_well_as_by_steps(gallery: Callable[..., Gallery]) -> None:
    """An epoch is two and a half steps here."""
    due = gallery(validation_epoch_interval=2.0).due
    assert [step for step in range(1, 21) if due.falls_on(step)] == [5, 10, 15, 20]
    due = gallery(validation_epoch_interval=0.6).due
    assert [step for step in range(1, 11) if due.falls_on(step)] == [2, 3, 5, 6, 8, 9, 10]


def test_a_folder_that_cannot_be_written_costs_no_picture(
    gallery: Callable[..., Gallery], trainer: Any, told: list[Event], tmp_path: Path
) -> None:
    (tmp_path / "validation").write_text("a file where the folder should be")
    job = gallery(disable_benchmark=True, validation_on_startup=True)
    job.run(trainer)
    (warning,) = (event for event in told if isinstance(event, Notice) and event.level == "warning")
    assert "kept in memory" in warning.text
    assert not any(isinstance(event, Painted) for event in told)
    (tmp_path / "validation").unlink()
    trainer.state.step = 10
    job.run(trainer)
    painted = [event.path.name for event in told if isinstance(event, Painted)]
    assert painted == sorted(os.listdir(tmp_path / "validation")) == [file_name(SHOT, 0), file_name(SHOT, 10)]


def test_a_page_lays_the_gallery_out_after_each_of_its_times(
    gallery: Callable[..., Gallery], trainer: Any, tmp_path: Path
) -> None:
    job = gallery()
    job.run(trainer)
    assert "step 10" not in (tmp_path / "gallery.html").read_text()
    trainer.state.step = 10
    job.run(trainer)
    page = (tmp_path / "gallery.html").read_text()
    assert '<a href="benchmark/step_0_cat_0_64x32.png">' in page
    assert '<a href="validation/step_10_cat_0_64x32.png">' in page


def test_clip_judges_the_whole_gallery_of_a_step_and_the_base_s_apart(
    gallery: Callable[..., Gallery], trainer: Any, told: list[Event], tmp_path: Path, tiny_clip: Path
) -> None:
    """Also what an earlier run painted: a resumed one paints only what is missing."""
    gallery((SHOT,), disable_benchmark=True, validation_on_startup=True).run(trainer)
    dog = replace(SHOT, nickname="dog", prompt="a dog", index=1)
    judge = {"evaluation_type": "clip", "pretrained_evaluation_model_name_or_path": str(tiny_clip)}
    gallery((SHOT, dog), validation_on_startup=True, **judge).run(trainer)
    base, trained = (event for event in told if isinstance(event, Measured))
    assert (base.kind, base.step, trained.kind, trained.step) == ("clip", 0, "clip", 0)
    scores = [judged(tiny_clip, Image.new("RGB", (64, 32), (200, 0, 0)), prompt) for prompt in ("a cat", "a dog")]
    expected = {"mean": sum(scores) / 2, "min": min(scores), "max": max(scores)}
    assert trained.figures == pytest.approx({f"clip_score/{name}": value for name, value in expected.items()}, abs=1e-3)
    assert set(base.figures) == {f"clip_score/base/{name}" for name in expected}
    assert len([event for event in told if isinstance(event, Painted)]) == 4


def test_a_picture_does_not_depend_on_those_before_it(gallery: Callable[..., Gallery], trainer: Any) -> None:
    """Whatever a library draws without being given a generator."""
    drawn: dict[str, list[float]] = {}

    class Drawing(FakeFamily):
        @contextmanager
        def sampler(self, denoiser: Any, device: str) -> Iterator[Callable[..., torch.Tensor]]:
            with super().sampler(denoiser, device) as sample:

                def drawing(shot: Shot, *rest: Any) -> torch.Tensor:
                    drawn.setdefault(shot.nickname, []).append(torch.rand(()).item())
                    return sample(shot, *rest)

                yield drawing

    trainer.family = Drawing(trainer.tuning)
    gallery(THREE, disable_benchmark=True, validation_on_startup=True).run(trainer)
    trainer.state.step = 10
    gallery(THREE[2:], disable_benchmark=True, validation_on_startup=True).run(trainer)
    assert drawn["cat 2"][0] == drawn["cat 2"][1]
