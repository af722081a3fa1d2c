"""The main job, as a user meets it: one command from pictures to weights, and what stock diffusers makes of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image

from tests.e2e.conftest import Workspace

GALLERY = "validation/step_6_validation_0_128x128.png"
BENCHMARK = "benchmark/step_0_validation_0_128x128.png"


def painted(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def stock_picture(pipeline: SanaPipeline, **settings: object) -> np.ndarray:
    """The gallery's picture, by the stock pipeline from the prompt's text on."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red square",
        height=128,
        width=128,
        num_inference_steps=2,
        guidance_scale=4.5,
        generator=torch.Generator("cpu").manual_seed(42),
        use_resolution_binning=False,
        **settings,
    ).images[0]
    return np.asarray(image).astype(int)


def test_a_lora_loads_in_the_stock_pipeline_and_paints_what_the_gallery_showed(workspace: Workspace) -> None:
    workspace.run("train")
    output = workspace.folder / "output"
    pipeline = SanaPipeline.from_pretrained(workspace.config["pretrained_model_name_or_path"])
    base = stock_picture(pipeline)
    pipeline.load_lora_weights(output)
    trained = stock_picture(pipeline)
    assert abs(trained - painted(output / GALLERY)).max() <= 1
    assert abs(base - painted(output / BENCHMARK)).max() <= 1
    assert abs(trained - base).max() > 8, "six steps at this rate must show"
    assert abs(stock_picture(pipeline, attention_kwargs={"scale": 0.0}) - base).max() <= 1


def test_full_tuning_ends_in_a_pipeline_that_paints_what_the_gallery_showed(workspace: Workspace) -> None:
    workspace.config |= {"model_type": "full", "learning_rate": 1e-3}
    workspace.run("train")
    output = workspace.folder / "output"
    pipeline = SanaPipeline.from_pretrained(output / "pipeline")
    assert abs(stock_picture(pipeline) - painted(output / GALLERY)).max() <= 1
    assert abs(painted(output / BENCHMARK) - painted(output / GALLERY)).max() > 8


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_average_loads_in_the_stock_pipeline_and_paints_its_pictures_of_the_gallery(
    workspace: Workspace, model_type: str
) -> None:
    workspace.config |= {"use_ema": True, "ema_decay": 0.8, "model_type": model_type}
    workspace.config |= {"learning_rate": 1e-3} if model_type == "full" else {}
    said = workspace.run("train", "--disable_benchmark")
    output = workspace.folder / "output"
    if model_type == "lora":
        pipeline = SanaPipeline.from_pretrained(workspace.config["pretrained_model_name_or_path"])
        pipeline.load_lora_weights(output / "ema")
    else:
        pipeline = SanaPipeline.from_pretrained(output / "ema" / "pipeline")
    average = stock_picture(pipeline)
    assert abs(average - painted(output / GALLERY.replace("_validation_", "_validation_ema_"))).max() <= 1
    assert abs(average - painted(output / GALLERY)).max() > 2, "the newest weights are ahead of their average"
    assert str(Path("output") / "ema") in said


def test_a_run_folder_tells_what_was_asked_and_what_became_of_the_pictures(workspace: Workspace) -> None:
    (workspace.folder / "pictures" / "a_broken_one.jpg").write_bytes(b"no picture")
    workspace.run("train", "--seed=7")
    output = workspace.folder / "output"
    config = json.loads((output / "config.json").read_text())
    assert (config["seed"], config["lora_rank"], config["max_grad_norm"]) == (7, 4, 0.1)
    assert json.loads((output / "config_sources.json").read_text())["seed"] == "command line"
    ledger = json.loads((output / "ledger.json").read_text())["datasets"]["pictures"]
    assert (ledger["found"], ledger["used"], len(ledger["excluded"])) == (5, 4, 1)
    assert ledger["excluded"][0]["file"] == "a_broken_one.jpg"
    assert sorted(workspace.losses()) == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_started_again_says_so(workspace: Workspace) -> None:
    workspace.run("train", "--max_train_steps=2", "--validation_prompt=")
    assert "Finished, step 2 of 2" in workspace.run("train", "--max_train_steps=2", "--validation_prompt=")


def test_a_finished_run_paints_what_its_last_gallery_still_lacks(workspace: Workspace) -> None:
    workspace.run("train")
    picture = workspace.folder / "output" / GALLERY
    before = painted(picture)
    picture.unlink()  # as if the run had been killed while it painted
    workspace.run("train")
    assert (painted(picture) == before).all()


def test_a_second_run_reuses_the_caches_and_loads_no_encoder(workspace: Workspace, tmp_path: Path) -> None:
    caches = ["--cache_dir_vae=cache/vae", "--validation_prompt="]
    workspace.datasets.append({"id": "text", "dataset_type": "text_embeds", "cache_dir": "cache/text"})
    workspace.run("train", *caches, "--max_train_steps=2")
    workspace.environment["PYTHONPROFILEIMPORTTIME"] = "1"
    said = workspace.run("train", *caches, "--max_train_steps=2", "--output_dir=other")
    assert "pictures: 4 reused" in said
    assert " encoded" not in said
    assert "transformer_sana" in said or "sana_transformer" in said, "the denoiser's module is imported, and listed"
    assert "modeling_gemma2" not in said


def test_a_changed_crop_encodes_only_the_pictures_whose_cut_moved(workspace: Workspace) -> None:
    workspace.run("train", "--max_train_steps=2", "--validation_prompt=")
    workspace.datasets[0]["crop_style"] = "corner"  # square pictures are cut at the same place either way
    said = workspace.run("train", "--max_train_steps=4", "--validation_prompt=")
    assert "pictures: 1 reused, 3 encoded (crop changed)" in said


def test_several_epochs_can_be_asked_for_instead_of_steps(workspace: Workspace) -> None:
    del workspace.config["max_train_steps"]
    workspace.run("train", "--num_train_epochs=3", "--validation_prompt=")
    assert max(workspace.losses()) == 6  # 4 pictures in batches of 2: 2 steps an epoch


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pretrained_model_name_or_path=./no/such/model"], "no/such/model"),
        (["--learning_rat=1"], "Did you mean `learning_rate`?"),
        (["--max_train_steps=soon"], "whole number"),
        (["--config_file=nowhere.json"], "nowhere.json"),
    ],
)
def test_what_cannot_be_trained_is_told_before_any_work(workspace: Workspace, words: list[str], told: str) -> None:
    said = workspace.run("train", *words, expect=2)
    assert told in said
    assert "Traceback" not in said


def test_missing_folders_captions_and_pictures_are_told_before_any_work(workspace: Workspace) -> None:
    said = workspace.run("train", "--data_backend_config=nowhere.json", expect=2)
    assert "nowhere.json" in said
    workspace.datasets[0]["instance_data_dir"] = "no/such/folder"
    assert "no/such/folder" in workspace.run("train", expect=2)
    workspace.datasets[0] |= {"instance_data_dir": "pictures", "caption_strategy": "textfile"}
    (workspace.folder / "empty").mkdir()
    workspace.datasets.append({"id": "nothing", "instance_data_dir": "empty"})
    said = workspace.run("train", expect=2)
    assert "a_red_square.png" in said
    assert "no images detected in dataset nothing" in said


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_model_that_was_cut_short_is_told_before_any_work(workspace: Workspace, part: str) -> None:
    model = workspace.folder / "model"
    shutil.copytree(workspace.config["pretrained_model_name_or_path"], model)
    os.truncate(model / part, 5000)
    said = workspace.run("train", "--pretrained_model_name_or_path=./model", expect=2)
    assert part in said
    assert "not a whole safetensors file" in said
    assert not (workspace.folder / "output").exists()


def test_check_shows_ledger_buckets_steps_and_gallery(workspace: Workspace) -> None:
    workspace.datasets[0]["crop"] = False
    report = json.loads(workspace.ask("check", "--json")[0])
    buckets = {(row["width_px"], row["height_px"]): row["pictures"] for row in report["buckets"]["pictures"]}
    assert sum(buckets.values()) == 4
    assert len(buckets) >= 3
    assert report["length"]["steps"] == 6
    assert report["pictures"] == ["validation 128x128"]
    assert report["prompts"] == {"validation": "a red square"}
    assert [(stock["needed"], stock["missing"]) for stock in report["caches"]] == [(4, 4), (5, 5)]
    assert report["memory"]["device_bytes"] > 0
    assert (report["downloads"], report["problems"]) == ([], [])
    assert not (workspace.folder / "output" / "cache" / "text").exists(), "check encodes nothing"
