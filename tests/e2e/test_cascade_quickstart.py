"""The Stable Cascade quickstart, on tiny weights: its config, its dataset file, its prompt library, its quick pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from simpletuner import cli
from simpletuner.examples.tiny import model_options
from simpletuner.networks.quantise import QuantisedLinear
from simpletuner.training.trainer import Trainer
from tests.e2e.conftest import Workspace
from tests.e2e.forked import Forks
from tests.quickstarts import CASCADE_CONFIG, CASCADE_DATASETS, CASCADE_LIBRARY


@pytest.fixture
def page(tmp_path: Path, tiny_repo: Callable[[str], Path], forks: Forks) -> Workspace:
    """As printed, but for the folders that it names, the weights' place, and the dataset keys of later versions."""
    (tmp_path / "data").mkdir()
    for number, size in enumerate([(1100, 1024), (900, 1200), (1600, 1600)]):
        Image.linear_gradient("L").resize(size).rotate(40 * number).convert("RGB").save(
            tmp_path / "data" / f"a_slope_{number}.png"
        )
    config = json.loads(CASCADE_CONFIG) | model_options("stable_cascade", tiny_repo("stable_cascade"))
    text = CASCADE_DATASETS.replace("/data/stable-cascade", "data").replace("/data/cache", "cache")
    datasets = json.loads(text)
    (tmp_path / "config" / "stable_cascade").mkdir(parents=True)
    (tmp_path / "config" / "stable_cascade" / "multidatabackend.json").write_text(json.dumps(datasets))
    (tmp_path / "config" / "stable_cascade" / "prompt_library.json").write_text(CASCADE_LIBRARY)
    return Workspace(tmp_path, config, datasets, forks=forks)


SMALL = ("--validation_resolution=256x128", "--validation_num_inference_steps=2")
BRIEF = (
    "--base_model_precision=no_change",
    "--max_train_steps=2",
    "--stable_cascade_validation_prior_num_inference_steps=2",
    "--report_to=none",
)


def small(page: Workspace) -> Workspace:
    entry = page.datasets[0] | {"bucket_resolutions": ["256x256"], "minimum_image_size": 0}
    del entry["maximum_image_size"], entry["target_downsample_size"]
    file = page.folder / "config" / "stable_cascade" / "multidatabackend.json"
    file.write_text(json.dumps([entry, page.datasets[1]]))
    return page


def test_the_config_trains_as_printed(page: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its 30,000 steps: an int8 base, adapters in float32, pictures of 1024 px by prior and decoder_lite; wandb keeps
    the run, and nothing is uploaded."""
    monkeypatch.chdir(page.folder)
    page.write()
    stored: list[Any] = []
    fit = Trainer.fit

    def look_and_fit(trainer: Trainer) -> None:
        stored.extend(module for module in trainer.denoiser.modules() if isinstance(module, QuantisedLinear))
        assert {weight.dtype for weight in trainer.tuning.parameters().values()} == {torch.float32}
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", look_and_fit)
    assert cli.main(["train", "--max_train_steps=1"]) == 0
    assert len(stored) == 6 * (2 + 4 + 1), "six layers of three blocks: feed-forward, attention, its mapper"
    output = page.folder / "output" / "stable_cascade_stage_c"
    assert Image.open(output / "validation" / "step_1_validation_0_1024x1024.png").size == (1024, 1024)
    assert list((output / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "## Gallery" in (output / "README.md").read_text()


def test_prior_and_decoder_lite_paint_full_size_pictures_of_the_library_and_the_average(page: Workspace) -> None:
    library = "--validation_prompt_library=config/stable_cascade/prompt_library.json"
    said = small(page).run("train", *SMALL, *BRIEF, library)
    output = page.folder / "output" / "stable_cascade_stage_c"
    names = ["validation_0", "portrait_1", "landscape_2", "product_3", "stylized_4"]
    wanted = {f"step_2_{name}_256x128.png" for name in names}
    wanted |= {f"step_2_{name.rpartition('_')[0]}_ema_{name.rpartition('_')[2]}_256x128.png" for name in names}
    assert {path.name for path in (output / "validation").iterdir()} == wanted
    picture = Image.open(output / "validation" / "step_2_validation_0_256x128.png")
    assert picture.size == (256, 128)
    assert (picture.info["guidance"], picture.info["inference_steps"]) == ("3.5", "2")
    assert len(picture.getcolors(maxcolors=2**16) or range(2**16)) > 50, "a picture, no flat colour"
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert (output / "ema" / "pytorch_lora_weights.safetensors").is_file()
    assert "adamw_bf16 keeps float32 weights here" in said
    assert "will not receive bug fixes" not in said
    assert list((page.folder / "cache" / "stable-cascade" / "text").rglob("shard-*.safetensors"))


def test_reduced_precision_prints_the_pages_error_and_trains_with_the_override(page: Workspace) -> None:
    small(page)
    arguments = ("train", *BRIEF, "--mixed_precision=bf16", "--validation_prompt=")
    assert "Stable Cascade Stage C requires --mixed_precision=no" in page.run(*arguments, expect=2)
    said = page.run(*arguments, "--i_know_what_i_am_doing")
    assert "Stable Cascade Stage C requires --mixed_precision=no" in said
    assert "Going on, since i_know_what_i_am_doing is set" in said
    losses = page.losses("output/stable_cascade_stage_c")
    assert list(losses) == [2]
    assert 0 < losses[2] < 10


def test_the_lite_prior_and_the_lite_decoder_are_the_quick_pair(page: Workspace) -> None:
    small(page).run("train", *SMALL, *BRIEF, "--model_flavour=stage-c-lite", "--use_ema=false", "--disable_benchmark")
    output = page.folder / "output" / "stable_cascade_stage_c"
    assert Image.open(output / "validation" / "step_2_validation_0_256x128.png").size == (256, 128)


@pytest.mark.parametrize("weighting", ["adaptive"])
def test_a_full_fine_tune_resumes_where_it_stopped(page: Workspace, weighting: str) -> None:
    small(page)
    arguments = ("train", *BRIEF, "--model_type=full", "--use_ema=false", "--validation_prompt=", "--log_step_interval=1")
    arguments += (f"--stable_cascade_loss_weighting={weighting}",)
    page.run(*arguments, "--max_train_steps=4", "--output_dir=whole", "--lr_scheduler=constant")
    page.run(*arguments, "--max_train_steps=2", "--output_dir=broken", "--lr_scheduler=constant")
    page.run(*arguments, "--max_train_steps=4", "--output_dir=broken", "--lr_scheduler=constant")
    assert page.losses("broken") == page.losses("whole")
    assert (page.folder / "whole" / "pipeline" / "prior" / "config.json").is_file()
