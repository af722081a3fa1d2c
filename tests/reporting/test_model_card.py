"""The model card, read back by the hub client's own parser."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from simpletuner.config.run import Run
from simpletuner.reporting.card_facts import dataset_facts, local_paths, result_files, told_settings
from simpletuner.reporting.model_card import DatasetFacts, ModelFacts, Picture, card, newest_pictures

EVIL = (
    '</code></table><script>alert("x")</script> | `code` ``` **bold** [a](b) ![c](d) #h\n\n'
    "---\nlicense: mit\n---\n# _own_ <Gallery />"
)
FACTS = ModelFacts(
    name="emoji",
    family="sana",
    title="Sana",
    kind="LoRA",
    base="maker/base-model",
    repository="tester/emoji",
    step=1200,
    length="1,200 optimiser steps: 12.5 epochs of 96 steps",
    usage="pipeline.load_lora_weights('emoji/pytorch_lora_weights.safetensors')\n",
    settings={"learning_rate": 1e-4, "optimizer": "adamw_bf16"},
    datasets=[DatasetFacts("pictures", 40, {"resolution": [1024, 768], "repeats": 3})],
    pictures=[
        Picture(
            "validation/step_1200_cat_1_64x32.png",
            {"nickname": "cat", "prompt": "a cat", "negative_prompt": "blurry", "seed": "42", "guidance": "4.5"},
        )
    ],
    instance_prompt="a photo of sks",
)


def test_the_hub_s_parser_finds_what_it_shows() -> None:
    data = ModelCard(card(FACTS)).data.to_dict()
    assert data["base_model"] == "maker/base-model"
    assert data["base_model_relation"] == "adapter"
    assert (data["license"], data["license_link"]) == ("other", "https://huggingface.co/maker/base-model")
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "sana", "not-for-all-audiences"} <= set(data["tags"])
    assert data["instance_prompt"] == "a photo of sks"
    assert data["widget"] == [
        {
            "text": "a cat",
            "output": {"url": "validation/step_1200_cat_1_64x32.png"},
            "parameters": {"negative_prompt": "blurry"},
        }
    ]


def test_the_text_tells_how_to_use_it_with_what_it_was_trained_and_of_whose_licence_it_is() -> None:
    text = card(FACTS)
    for wanted in (
        "hf download tester/emoji --local-dir emoji",
        "```python\npipeline.load_lora_weights('emoji/pytorch_lora_weights.safetensors')\n```",
        "1,200 optimiser steps: 12.5 epochs of 96 steps.",
        "### pictures\n\n- pictures: 40",
        "[maker/base-model](https://huggingface.co/maker/base-model)",
        "its licence applies to them",
        "<Gallery />",
        "| `learning_rate` | `0.0001` |",
        "- `resolution`: `1024x768`",
    ):
        assert wanted in text


def test_a_base_of_this_machine_is_no_link_and_its_path_is_not_told() -> None:
    usage = "SanaPipeline.from_pretrained('/home/me/models/sana')"
    local = replace(FACTS, base="", repository="", usage=usage, paths=("/home/me", "/home/me/models/sana"))
    text = card(local)
    assert "/home/me" not in text
    assert "from_pretrained('path/to/sana')" in text
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "unknown"
    assert "base_model" not in data


def test_other_people_s_words_become_no_markup() -> None:
    facts = replace(
        FACTS,
        name=EVIL,
        settings={"a": EVIL},
        datasets=[DatasetFacts(EVIL, 1, {"instance_prompt": EVIL})],
        pictures=[Picture("validation/a_1_64x64.png", {"nickname": EVIL, "prompt": EVIL, "negative_prompt": EVIL})],
        instance_prompt=EVIL,
        usage=f"pipeline({EVIL!r})",
    )
    page = ModelCard(card(facts))
    assert page.data.to_dict()["license"] == "other"
    assert page.data.to_dict()["widget"][0]["text"] == EVIL
    outside_code = re.sub(r"(````+)python\n.*?\n\1", "", page.text, flags=re.DOTALL)
    assert outside_code != page.text
    assert "<script" not in outside_code
    assert outside_code.count("<Gallery />") == 1
    assert "[a](b)" not in outside_code
    rows = [line for line in outside_code.splitlines() if "alert" in line and line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [7, 3], "no cell ends early"


def test_a_note_stands_as_written_and_a_card_may_be_safe_for_work() -> None:
    text = card(replace(FACTS, note="Trained for **Ada**.", is_safe_for_work=True))
    assert "\n\nTrained for **Ada**.\n\n" in text
    assert "not-for-all-audiences" not in ModelCard(text).data.to_dict()["tags"]


def test_the_newest_pictures_come_in_the_order_of_the_prompts_with_their_own_metadata(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    for step, index, name in [(10, 11, "b"), (10, 2, "你好"), (5, 0, "old"), (10, 0, "validation")]:
        info = PngInfo()
        info.add_itxt("nickname", f"<{name}>")
        info.add_itxt("prompt", "a | b")
        Image.new("RGB", (64, 64)).save(tmp_path / "validation" / f"step_{step}_{name}_{index}_64x64.png", pnginfo=info)
    (tmp_path / "validation" / "step_10_torn_3_64x64.png").write_bytes(b"no picture")
    found = newest_pictures(tmp_path, 10)
    assert [picture.facts["nickname"] for picture in found] == ["<validation>", "<你好>", "<b>"]
    assert all((tmp_path / picture.file).is_file() for picture in found)
    data = ModelCard(card(replace(FACTS, pictures=found))).data.to_dict()
    assert [one["text"] for one in data["widget"]] == ["a | b"] * 3, "and YAML has them as text"


def test_settings_are_those_that_made_the_weights_without_paths(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run("sana", lora_rank=8, init_lora=str(tmp_path / "a.safetensors"), output_dir=str(tmp_path / "out"))
    values: dict[str, Any] = {}
    for section in (run.model, run.adapter, run.training, run.checkpointing, run.reporting, run.hub, run.trackers, run.data):
        values |= dict(section)
    told = told_settings(replace(run, sources=_Written()), {**dict.fromkeys(_names(run)), **values})
    assert told["lora_rank"] == 8
    assert not {"init_lora", "output_dir", "pretrained_model_name_or_path", "log_level", "hub_model_id"} & told.keys()
    assert str(tmp_path / "a.safetensors") in local_paths(run)


class _Written(dict[str, str]):
    """Every option was written."""

    def __missing__(self, key: str) -> str:
        return "command line"


def _names(run: Run) -> list[str]:
    parts = [part for part in run.__dict__.values() if hasattr(type(part), "model_fields")]
    return [name for part in parts for name in type(part).model_fields]


def test_a_set_tells_what_is_obeyed_and_never_its_folder() -> None:
    entry = {
        "id": "mine",
        "dataset_type": "image",
        "instance_data_dir": "/home/me/pictures",
        "cache_dir_vae": "/home/me/cache",
        "resolution": 512,
        "crop": False,
        "crop_style": "random",
        "caption_strategy": "instanceprompt",
        "instance_prompt": "sks",
        "repeats": 2,
    }
    entry |= {"bucket_resolutions": None, "caption_missing": "error"}
    config = {"data_backend_config": [entry, {"id": "text-embeds", "dataset_type": "text_embeds"}]}
    (facts,) = dataset_facts(config, {"mine": {"512x512": 3, "448x576": 20}})
    assert facts.pictures == 23
    assert dict(facts.options) == {
        "resolution": 512,
        "crop": False,
        "repeats": 2,
        "caption_strategy": "instanceprompt",
        "instance_prompt": "sks",
        "buckets": "448x576 (20), 512x512 (3)",
    }


def test_a_pipeline_is_uploaded_to_the_top_and_an_adapter_with_its_average(tmp_path: Path) -> None:
    for name in (
        "README.md",
        "config.json",
        "metrics.jsonl",
        "checkpoint-1/weights.safetensors",
        "pipeline/model_index.json",
        "pipeline/transformer/weights.safetensors",
        "ema/pipeline/model_index.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = result_files(tmp_path, "pipeline", [])
    assert {place: path.read_text() for place, path in files.items()} == {
        "README.md": "README.md",
        "simpletuner_config.json": "config.json",
        "model_index.json": "pipeline/model_index.json",
        "transformer/weights.safetensors": "pipeline/transformer/weights.safetensors",
        "ema/model_index.json": "ema/pipeline/model_index.json",
    }
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "a.png").touch()
    (tmp_path / "adapter.safetensors").touch()
    (tmp_path / "ema" / "adapter.safetensors").touch()
    picture = Picture("validation/a.png", {})
    names = set(result_files(tmp_path, "adapter.safetensors", [picture]))
    assert {"adapter.safetensors", "ema/adapter.safetensors", "validation/a.png", "README.md"} <= names
    assert "model_index.json" not in names


@pytest.mark.parametrize("name", ["emoji", EVIL])
def test_the_text_begins_with_one_heading(name: str) -> None:
    body = ModelCard(card(replace(FACTS, name=name))).text
    assert [line[:2] for line in body.splitlines() if re.match("# ", line)] == ["# "]
