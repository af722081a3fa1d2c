"""Blocks of the quickstarts: what this version declares loads as written, what it does not is an unknown key."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.quickstarts import CASCADE_DATASETS, SD3_DATASETS

Project = Any

CASCADE_PAGE: dict[str, Any] = {
    "base_model_precision": "int8-torchao",
    "checkpoint_step_interval": 100,
    "data_backend_config": "config/stable_cascade/multidatabackend.json",
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "hub_model_id": "stable-cascade-stage-c-lora",
    "learning_rate": 1e-4,
    "lora_alpha": 16,
    "lora_rank": 16,
    "lora_type": "standard",
    "lr_scheduler": "cosine",
    "max_train_steps": 30000,
    "mixed_precision": "no",
    "model_type": "lora",
    "optimizer": "adamw_bf16",
    "output_dir": "output/stable_cascade_stage_c",
    "report_to": "wandb",
    "seed": 42,
    "train_batch_size": 4,
    "use_ema": True,
    "vae_batch_size": 1,
    "validation_guidance": 4.0,
    "validation_negative_prompt": "ugly, blurry, low-res",
    "validation_num_inference_steps": 30,
    "validation_prompt": "a cinematic photo of a shiba inu astronaut",
    "validation_resolution": "1024x1024",
}
SD3_PAGE = {
    "--validation_guidance_skip_layers": [7, 8, 9],
    "--validation_guidance_skip_layers_start": 0.01,
    "--validation_guidance_skip_layers_stop": 0.2,
    "--validation_guidance_skip_scale": 2.8,
    "--validation_guidance": 4.0,
    "--flow_use_uniform_schedule": True,
    "--flow_schedule_auto_shift": True,
}


def unknown(problems: list[str]) -> set[str]:
    found = [re.search(r"[Uu]nknown (?:option|key) `(?:--)?(\w+)`", problem) for problem in problems]
    assert all(found), problems
    return {match[1] for match in found if match}


def test_the_cascade_pages_config_loads_and_its_hub_name_alone_uploads_nothing(project: Project) -> None:
    project.write("config/stable_cascade/multidatabackend.json", (project.root / "config/multidatabackend.json").read_text())
    project.options(**CASCADE_PAGE)
    run = project.run()
    assert run.trackers.trackers == ("wandb",)
    assert (run.hub.hub_model_id, run.hub.push_to_hub) == ("stable-cascade-stage-c-lora", False)
    assert any("`hub_model_id` has no effect here" in notice for notice in run.notices)


def test_the_cascade_pages_dataset_file_loads_as_it_is_but_for_its_folders(project: Project) -> None:
    project.write("config/multidatabackend.json", CASCADE_DATASETS.replace("/data/stable-cascade", "datasets/pictures"))
    run = project.run()
    [dataset] = run.datasets
    assert dataset.bucket_resolutions == ((1024, 1024), (896, 1152), (1152, 896))
    assert (dataset.crop, dataset.crop_style, dataset.prepend_instance_prompt, dataset.repeats) == (True, "random", False, 1)
    assert (dataset.minimum_image_size, dataset.maximum_image_size, dataset.target_downsample_size) == (768, 1536, 1024)
    assert run.text_embeds.cache_dir == "/data/cache/stable-cascade/text"
    idle = [line for line in run.notices if "no effect" in line]
    assert len(idle) == 1
    assert "Dataset `primary`: `resolution` has no effect here: it is obeyed only with bucket_resolutions=unset." in idle


def test_the_sd3_pages_dataset_file_loads_as_it_is_but_for_its_folders(project: Project) -> None:
    (project.root / "datasets" / "pseudo-camera-10k").mkdir()
    project.write("config/multidatabackend.json", SD3_DATASETS.replace("/home/user/simpletuner", str(project.root)))
    run = project.run()
    for dataset, written in zip((*run.datasets, run.text_embeds), json.loads(SD3_DATASETS), strict=True):
        plain = {key: value for key, value in written.items() if not key.endswith("_dir") and key != "cache_dir_vae"}
        assert plain.items() <= dataset.model_dump().items()
    assert not any("no effect" in line for line in run.notices)


def test_of_the_sd3_pages_block_only_skip_layer_guidance_is_unknown(project: Project) -> None:
    project.options(**SD3_PAGE)
    assert all("skip" in name for name in unknown(project.problems()))
    project.options(**{name: value for name, value in SD3_PAGE.items() if "skip" not in name})
    run = project.run()
    assert (run.flow.flow_use_uniform_schedule, run.flow.flow_schedule_auto_shift) == (True, True)
    assert run.validation.validation_guidance == 4.0
