from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.checkup import inspect
from simpletuner.checkup_text import as_text
from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.config.run import Run
from simpletuner.data.plan import PlanSet, Stream
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import LatentSpec
from simpletuner.errors import DataError, UserError
from simpletuner.evaluation.files import png_of
from simpletuner.evaluation.names import facts, is_painted
from simpletuner.events import Event, Notice
from simpletuner.families import load as load_family
from simpletuner.preflight import length_of, open_sets, plan_of, shots_of

LATENT = LatentSpec(channels=4, cell_px=8, alignment_px=64, native_edge_px=128)


def stream_of(batches: int) -> Stream:
    return Stream([PlanSet(np.arange(batches), np.zeros(batches, np.int32), [(64, 64)], batch_size=1)], seed=0)


def with_sets(run: Run, folder: Path, **sets: dict[str, Any]) -> Run:
    entries = []
    for name, keys in sets.items():
        (folder / name).mkdir()
        entries.append(ImageDataset(id=name, instance_data_dir=str(folder / name), cache_dir_vae=str(folder / "cache"), **keys))
    return replace(run, datasets=tuple(entries))


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulation", "ranks", "steps"),
    [
        (10, 11, 10, 1, 11),  # 11 / 10 * 10 is a little more than 11 in floating point
        (0.07, 100, 1, 1, 7),  # so is 0.07 * 100
        (1.1, 10, 1, 1, 11),
        (0.1, 30, 1, 1, 3),
        (3, 7, 1, 3, 7),
        (1, 7, 2, 2, 2),
        (0.01, 7, 1, 1, 1),
    ],
)
def test_epochs_make_just_the_steps_that_see_them_whole(
    make_run: Callable[..., Run], epochs: float, batches: int, accumulation: int, ranks: int, steps: int
) -> None:
    run = make_run("sana", num_train_epochs=epochs, gradient_accumulation_steps=accumulation)
    assert length_of(run, stream_of(batches), ranks=ranks).steps == steps


@pytest.mark.parametrize(("limit", "steps"), [(19, 19), (21, 20)])
def test_of_steps_and_epochs_the_earlier_end_counts(make_run: Callable[..., Run], limit: int, steps: int) -> None:
    run = make_run("sana", max_train_steps=limit, num_train_epochs=2)
    assert length_of(run, stream_of(10), ranks=1).steps == steps


def test_a_sets_own_batch_share_and_span_reach_the_plan(make_run: Callable[..., Run], tmp_path: Path) -> None:
    keys = {"probability": 0.5, "repeats": 2, "start_epoch": 2, "end_epoch": 3, "start_step": 5, "end_step": 9}
    run = make_run("sana", train_batch_size=4, data_backend_sampling="uniform")
    run = with_sets(run, tmp_path, plain={}, own={"train_batch_size": 2, **keys})
    for name in ("plain", "own"):
        Image.new("RGB", (128, 128)).save(tmp_path / name / "a_picture.png")
    stream = plan_of(run, open_sets(run, LATENT, Alone(), lambda _: None))
    assert stream.is_uniform
    plain, own = stream.sets
    assert (plain.name, plain.batch_size, plain.first_epoch, plain.first_step) == ("plain", 4, 0, 0)
    assert plain.end_epoch == plain.end_step == math.inf
    assert (own.name, own.batch_size, own.probability, own.repeats) == ("own", 2, 0.5, 2)
    assert (own.first_epoch, own.end_epoch, own.first_step, own.end_step) == (1, 3, 4, 9), "from 0, the ends left out"


def spans(*bounds: dict[str, Any]) -> Stream:
    plans = [PlanSet(np.arange(10), np.zeros(10, np.int32), [(64, 64)], 1, name=f"set-{n}") for n in range(len(bounds))]
    return Stream([replace(plan, **each) for plan, each in zip(plans, bounds, strict=True)], seed=0)


def test_a_set_that_never_gets_its_turn_is_told(make_run: Callable[..., Run]) -> None:
    length = length_of(make_run("sana", max_train_steps=30), spans({}, {"first_step": 30}), ranks=1)
    assert length.warnings == ("set-1: never drawn from, for its start lies beyond the end of the run.",)
    assert length_of(make_run("sana", max_train_steps=31), spans({}, {"first_step": 30}), ranks=1).warnings == ()


def test_a_run_ends_with_its_last_set_and_says_so(make_run: Callable[..., Run]) -> None:
    length = length_of(make_run("sana", max_train_steps=30), spans({"end_epoch": 2}, {"end_step": 12}), ranks=1)
    assert length.warnings == (f"Training ends after step {length.steps}: all datasets have ended (end_epoch, end_step).",)
    assert 20 < length.steps < 30


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ([{"first_step": 5}], "After step 0 of the run no dataset is drawn from, and set-0 waits"),
        ([{"end_step": 5}, {"first_step": 7}], "After step 5 of the run no dataset is drawn from, and set-1 waits"),
        ([{"end_epoch": 1}, {"first_step": 20}], "After step 10 of the run no dataset is drawn from, and set-1 waits"),
    ],
)
def test_a_gap_between_sets_that_no_step_can_cross_is_refused(
    make_run: Callable[..., Run], bounds: list[dict[str, Any]], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        length_of(make_run("sana", max_train_steps=30), spans(*bounds), ranks=1)


def test_epochs_without_any_set_pass_at_once(make_run: Callable[..., Run]) -> None:
    stream = spans({"end_epoch": 1}, {"first_epoch": 4})
    assert length_of(make_run("sana", num_train_epochs=6), stream, ranks=1).steps == 30


def test_all_unusable_datasets_are_told_at_once(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = with_sets(make_run("sana"), tmp_path, cats={}, dogs={})
    with pytest.raises(DataError, match=r"2 datasets cannot be used(.|\n)*dataset cats(.|\n)*dataset dogs"):
        open_sets(run, LATENT, Alone(), lambda _: None)


def test_sets_to_judge_by_are_in_the_report_as_such_and_lengthen_nothing(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = with_sets(
        make_run("sana", max_train_steps=4, validation_seed=1, optimizer="torch-adamw", learning_rate=1e-4),
        tmp_path,
        cats={},
        dogs={"dataset_type": "eval"},
    )
    text = run.text_embeds.model_copy(update={"cache_dir": str(tmp_path / "text")})
    run = replace(run, datasets=run.datasets[:1], eval_datasets=run.datasets[1:], text_embeds=text)
    for name, count in (("cats", 3), ("dogs", 2)):
        for number in range(count):
            Image.new("RGB", (128, 128)).save(tmp_path / name / f"picture_{number}a.png")
    report, _ = inspect(run, lambda _: None)
    assert {name: ledger["dataset_type"] for name, ledger in report.ledgers.items()} == {"cats": "image", "dogs": "eval"}
    assert [(row.pictures, row.batches) for rows in report.buckets.values() for row in rows] == [(3, 3), (2, 0)]
    assert report.length.steps_per_epoch == 3
    assert "dogs (eval): 2 found = 2 used + 0 excluded" in as_text(report)


def test_a_set_to_judge_by_needs_no_masks_where_all_sets_are_said_to_have_them(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """As `conditioning_data` in the main config does; the eval loss knows no masks."""
    keys = {"conditioning_data": "masks"}
    run = with_sets(make_run("sana"), tmp_path, cats=keys, dogs={"dataset_type": "eval", **keys}, masks={})
    masks = ConditioningDataset(id="masks", instance_data_dir=str(tmp_path / "masks"))
    run = replace(run, datasets=run.datasets[:1], eval_datasets=run.datasets[1:2], conditioning=(masks,))
    for name in ("cats/a_cat", "masks/a_cat", "dogs/a_dog"):
        Image.new("RGB", (128, 128)).save(tmp_path / f"{name}.png")
    cats, dogs = open_sets(run, LATENT, Alone(), lambda _: None)
    assert (cats.masks is None, dogs.masks is None, dogs.ledger.used) == (False, True, 1)


@pytest.mark.parametrize(("model_type", "notices"), [("full", 1), ("lora", 0)])
def test_full_tuning_says_that_regularisation_data_is_ordinary_to_it(
    make_run: Callable[..., Run], tmp_path: Path, model_type: str, notices: int
) -> None:
    run = with_sets(make_run("sana", model_type=model_type), tmp_path, cats={}, others={"is_regularisation_data": True})
    for name in ("cats", "others"):
        Image.new("RGB", (128, 128)).save(tmp_path / name / "a_picture.png")
    told: list[Event] = []
    open_sets(run, LATENT, Alone(), told.append)
    said = [event.text for event in told if isinstance(event, Notice) and "ordinary training" in event.text]
    assert len(said) == notices
    assert all(text.startswith("others: ") for text in said)


def test_buckets_beyond_the_denoisers_positions_are_refused_before_any_work(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = with_sets(make_run("sana"), tmp_path, cats={}, long={"maximum_aspect_ratio": 6})
    Image.new("RGB", (128, 128)).save(tmp_path / "cats" / "a_picture.png")
    Image.new("RGB", (384, 64)).save(tmp_path / "long" / "a_picture.png")
    sets = open_sets(run, replace(LATENT, longest_edge_px=320), Alone(), lambda _: None)
    assert [max(images.buckets[images.bucket_ids[0]]) for images in sets] == [128, 320]
    with pytest.raises(DataError, match=r"too large: long: 320x64\.\nWhy:  this model's table of positions ends at 256 px"):
        open_sets(run, replace(LATENT, longest_edge_px=256), Alone(), lambda _: None)


def test_gallery_sizes_beyond_the_denoisers_positions_are_refused_before_any_work(make_run: Callable[..., Run]) -> None:
    options = {"validation_prompt": "a cat", "validation_seed": 1}
    family = load_family(make_run("sd3", validation_resolution="1536x1536", **options))
    assert len(shots_of(family.run, family, lambda _: None)) == 1
    family = load_family(make_run("sd3", validation_resolution="128x128,128x1552", **options))
    with pytest.raises(UserError, match=r"asks for 128x1552\.\nWhy:  this model's table of positions ends at 1536 px"):
        shots_of(family.run, family, lambda _: None)


def test_the_denoiser_itself_knows_no_place_beyond_its_familys_longest_edge(make_run: Callable[..., Run]) -> None:
    family = load_family(make_run("sd3"))
    denoiser = family.load_denoiser()
    assert family.latent.longest_edge_px is not None
    cells = family.latent.longest_edge_px // 8
    embed = denoiser.get_submodule("pos_embed")
    embed(torch.zeros(1, 16, 2, cells))
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        embed(torch.zeros(1, 16, 2, cells + 2))


def test_a_picture_says_which_skip_layer_guidance_and_shift_it_is_made_with(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    plain = {"validation_prompt": "a cat", "validation_seed": 1}
    options = {**plain, "validation_guidance_skip_layers": (1, 2), "validation_flow_shift": 2.5}
    said, shots = [], []
    for family in (load_family(make_run("sd3", **each)) for each in (plain, options)):
        [shot] = shots_of(family.run, family, lambda _: None)
        said.append(facts(shot, step=0, weights="base"))
        shots.append(shot)
    assert {**said[0], **said[1]} == said[1]
    assert said[1].keys() - said[0].keys() == {
        "skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop",
        "flow_shift",
    }  # fmt: skip
    assert (said[1]["skip_guidance_layers"], said[1]["flow_shift"]) == ("[1, 2]", "2.5")
    for made_with in said:
        (tmp_path / "a.png").write_bytes(png_of(Image.new("RGB", (8, 8)), made_with))
        assert [is_painted(tmp_path / "a.png", shot, 0, "base") for shot in shots] == [made_with is each for each in said]


@pytest.mark.parametrize(("every", "warnings"), [(20, 0), (21, 1)])
def test_frames_further_apart_than_a_picture_has_steps_are_told(
    make_run: Callable[..., Run], every: int, warnings: int
) -> None:
    told: list[Event] = []
    options = {"validation_preview": True, "validation_preview_steps": every, "validation_num_inference_steps": 20}
    run = make_run("sana", validation_prompt="a cat", validation_seed=1, **options)
    shots_of(run, load_family(run), told.append)
    assert sum("no frame is shown" in event.text for event in told if isinstance(event, Notice)) == warnings
