"""What `check` warns of; that it shows what there is, end to end, is in tests/e2e/test_train.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from simpletuner import checkup
from simpletuner.checkup import (
    cache_warnings,
    folder_problems,
    inspect,
    memory_warnings,
    room_problems,
    room_warnings,
    torchvision_problems,
)
from simpletuner.config.datasets import ConditioningDataset, ImageDataset, TextEmbedsDataset
from simpletuner.config.run import Hardware, Run
from simpletuner.data.stores.urls import Urls
from simpletuner.disk import Room
from simpletuner.errors import ManyProblems
from simpletuner.estimates import GIB, Memory, Stage
from simpletuner.events import Event
from simpletuner.stocks import CacheStock

STEP = Stage("training", 10 * GIB, 12 * GIB)
MEMORY = Memory((STEP,), STEP, is_shared=False)


STOCK = CacheStock("prompts", "prompts (t5)", "text", "before", needed=10**6, missing=10**6, item_bytes=10**6)


def install(folder: Path, version: str, wants: str) -> None:
    """A torchvision as pip leaves it, for `importlib.metadata`."""
    place = folder / f"torchvision-{version}.dist-info"
    place.mkdir()
    place.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchvision\nVersion: {version}\nRequires-Dist: {wants}\n"
    )


@pytest.mark.parametrize("wants", ["torch==2.5.1", "torch (==2.5.1)"])
def test_a_torchvision_of_another_torch_is_a_problem_with_its_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wants: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "0.20.1", wants)
    [problem] = torchvision_problems()
    assert "torchvision 0.20.1 was built for torch 2.5" in problem.what
    assert problem.mend.startswith("pip uninstall torchvision")


def test_a_torchvision_that_fits_or_none_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(torchvision_problems())
    monkeypatch.syspath_prepend(str(tmp_path))
    minor = ".".join(checkup.metadata.version("torch").split(".")[:2])
    install(tmp_path, "9.9", f"torch=={minor}.0")
    assert not list(torchvision_problems())


def test_a_card_that_is_too_small_is_told_with_what_saves_memory(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "machine_bytes", lambda: 64 * GIB)
    run = make_run("sana")
    small, large = (replace(run, hardware=Hardware("cuda", name="a card", memory_bytes=each * GIB)) for each in (24, 25))
    [told] = memory_warnings(small, MEMORY)
    assert told.startswith("The run takes about 24.7 GiB, but a card has 24.0 GiB: store the base in fewer bits")
    assert not list(memory_warnings(large, MEMORY))


def test_a_machine_with_too_little_memory_is_told(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "machine_bytes", lambda: 16 * GIB)
    [told] = memory_warnings(make_run("sana"), replace(MEMORY, is_shared=True))
    assert told == "The run takes about 23.5 GiB of ordinary memory, and this machine has 16.0 GiB."


def test_a_disk_too_small_for_the_first_checkpoint_is_a_problem_and_for_the_rest_a_warning() -> None:
    full, tight, roomy = (Room("output", needed_bytes=9, first_bytes=5, free_bytes=free) for free in (4, 5, 9))
    assert [len(list(room_problems([room], []))) for room in (full, tight, roomy)] == [1, 0, 0]
    assert [len(list(room_warnings([room]))) for room in (full, tight, roomy)] == [0, 1, 0]


def test_a_cache_that_fills_a_disk_is_told_with_what_does_without(make_run: Callable[..., Run]) -> None:
    [problem] = room_problems([Room("text", needed_bytes=9, first_bytes=9, free_bytes=4)], [STOCK])
    assert problem.mend.endswith("; text_cache_disable encode while training, without a cache.")
    assert list(cache_warnings([STOCK])) == [
        "The cache of prompts (t5) takes up to 931.3 GiB. `text_cache_disable` encodes while training, without a cache."
    ]
    assert not list(cache_warnings([replace(STOCK, needed=1000, missing=1000)]))


def silent(event: Event) -> None:
    """Hears everything."""


@pytest.fixture
def run(make_run: Callable[..., Run], tmp_path: Path) -> Run:
    """A run over a few pictures, nothing cached."""
    for folder in ("cats", "masks"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.new("RGB", (160, 128), (40 * number, 90, 40)).save(tmp_path / folder / f"cat {number}.png")
    entry = ImageDataset(
        id="cats", instance_data_dir=str(tmp_path / "cats"), cache_dir_vae=str(tmp_path / "vae"), resolution=128
    )
    run = make_run(
        "stable_cascade", output_dir=str(tmp_path / "output"), validation_seed=1, optimizer="torch-adamw", max_train_steps=2
    )
    return replace(run, datasets=(entry,), text_embeds=TextEmbedsDataset(cache_dir=str(tmp_path / "text")))


def test_every_cache_is_listed_and_what_is_encoded_while_training_is_none(run: Run, tmp_path: Path) -> None:
    [cats] = run.datasets
    masked = cats.model_copy(update={"conditioning_data": "masks", "vae_cache_disable": True, "train_batch_size": 64})
    held = cats.model_copy(update={"id": "held", "dataset_type": "eval", "vae_cache_ondemand": True})
    run = replace(
        run, datasets=(masked,), eval_datasets=(held,),
        family=run.family.model_copy(update={"stable_cascade_image_embed_probability": 0.5}),
        conditioning=(ConditioningDataset(id="masks", instance_data_dir=str(tmp_path / "masks")),),
    )  # fmt: skip
    report, _ = inspect(run, silent)
    assert [(stock.name, stock.filled, stock.needed, stock.missing) for stock in report.caches] == [
        ("masks of cats", "before", 3, 3),
        ("pictures of cats", "never", 3, 0),
        ("pictures of held", "ondemand", 3, 3),
        ("image embeds of cats", "never", 3, 0),
        ("prompts (clip-g)", "before", 4, 4),
    ]
    assert report.caches[1].text == "pictures of cats: 3, encoded while training and not cached"
    written = {one.what: one for one in report.writings if one.size_bytes}
    assert {name for name in written if "cache" in name} == {
        "the cache of masks of cats", "the cache of pictures of held", "the cache of prompts (clip-g)"
    }  # fmt: skip
    assert not written["the cache of pictures of held"].is_first
    assert len(report.memory.staying) == 2, "what makes latents, and what makes image embeds"
    fewer = replace(run, datasets=(masked.model_copy(update={"train_batch_size": 1}),))
    assert inspect(fewer, silent)[0].memory.training.work_bytes < report.memory.training.work_bytes


def test_pictures_that_a_list_of_urls_brought_are_told_and_take_no_more_room(run: Run, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/cat.png"
    (tmp_path / "urls.csv").write_text(f"url\n{url}\n")
    keys = {
        "type": "csv",
        "instance_data_dir": None,
        "csv_file": str(tmp_path / "urls.csv"),
        "csv_cache_dir": str(tmp_path / "web"),
    }
    run = replace(run, datasets=(run.datasets[0].model_copy(update=keys),))
    path = Urls(run.datasets[0])._path(url)
    path.parent.mkdir(parents=True)
    Image.new("RGB", (160, 128)).save(path)
    report, _ = inspect(run, silent)
    [there] = [one for one in report.writings if one.is_there]
    assert (there.what, there.size_bytes) == ("the downloaded pictures of cats", path.stat().st_size)
    assert sum(room.needed_bytes for room in report.rooms) == sum(one.size_bytes for one in report.writings) - there.size_bytes


def test_all_that_is_wrong_is_told_at_once(run: Run, tmp_path: Path) -> None:
    """A model cut short, an empty set, no room for the output: three mends, one run of the command."""
    model = tmp_path / "model"
    shutil.copytree(str(run.model.pretrained_model_name_or_path), model)
    [weights] = (model / "text_encoder").glob("*.safetensors")
    os.truncate(weights, 500)
    (tmp_path / "cats2").mkdir()
    (tmp_path / "output").write_text("no folder")
    empty = run.datasets[0].model_copy(update={"id": "none", "instance_data_dir": str(tmp_path / "cats2")})
    broken = replace(
        run, datasets=(*run.datasets, empty), model=run.model.model_copy(update={"pretrained_model_name_or_path": str(model)})
    )
    with pytest.raises(ManyProblems) as caught:
        inspect(broken, silent)
    told = str(caught.value)
    assert told.startswith("3 problems:")
    for words in ("is a file", "not a whole safetensors file", "no images detected in dataset none"):
        assert words in told
    assert caught.value.exit_code == 2


def test_folders_within_one_that_cannot_be_written_are_not_told_again(run: Run, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("no folder")
    within = run.datasets[0].model_copy(update={"cache_dir_vae": str(tmp_path / "output" / "cache")})
    [problem] = folder_problems(replace(run, datasets=(within,)))
    assert problem.option == "output_dir"
    text = run.text_embeds.model_copy(update={"cache_dir": str(tmp_path / "output"), "text_cache_disable": True})
    away = replace(
        run, checkpointing=run.checkpointing.model_copy(update={"output_dir": str(tmp_path / "new")}), text_embeds=text
    )
    assert not list(folder_problems(away)), "no prompt is written there"


def test_json_has_its_problems_whatever_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from simpletuner.cli import main

    (tmp_path / "config.json").write_text('{"model_family": "sana", "no_such_key": 1}')
    assert main(["check", "--json", "--config_file", str(tmp_path / "config.json")]) == 2
    answer, said = capsys.readouterr()
    document = json.loads(answer)
    assert (document["version"], document["is_complete"]) == (1, False)
    assert any("no_such_key" in problem["what"] and problem["mend"] for problem in document["problems"])
    assert "no_such_key" in said


def test_an_output_folder_that_cannot_be_used_hides_nothing_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("no folder")
    report, _ = inspect(run, silent)
    assert [problem.option for problem in report.problems] == ["output_dir"]
    assert (report.exit_code, report.ledgers["cats"]["used"]) == (2, 3)


def test_a_password_in_the_hubs_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:secret@mirror.example/hub")
    assert checkup.endpoint() == "https://***@mirror.example/hub"


def test_a_picture_of_the_gallery_larger_than_those_trained_on_counts(run: Run) -> None:
    small = inspect(run, silent)[0].memory.training.work_bytes
    painted = run.validation.model_copy(
        update={"validation_prompt": "a cat", "validation_resolution": "2048x2048", "validation_step_interval": 1}
    )
    assert inspect(replace(run, validation=painted), silent)[0].memory.training.work_bytes > 2 * small
