"""Faults while caching and saving: kills, full disks, folders without rights, spoilt shards. Nothing finished is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.cache import TensorCache
from simpletuner.data.index import open_dataset
from simpletuner.data.samples import Recipe
from simpletuner.errors import SimpletunerError, UserError
from simpletuner.events import Event
from tests.e2e import killed
from tests.e2e.conftest import Workspace, environment

Items = dict[str, dict[str, Tensor]]


def pictures_in(folder: Path, count: int) -> Path:
    folder.mkdir()
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64 + 32 * (n % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture_{n}.png")
    return folder


def served(cache: Path) -> Items:
    """Every item that a run would be given, of all recipes."""
    items: Items = {}
    for folder in cache.glob("*/*/"):
        store = TensorCache(folder.parent, _Named(folder.name))
        told: list[Event] = []
        store.set_aside(told.append)
        assert not told, "a shard that is not whole bears the name of one"
        for key in [*store.keys()]:
            items[f"{folder.name}/{key}"] = store.get(key)
    return items


class _Named(Recipe):
    """A recipe known by its folder alone."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest, {})

    @property
    def digest(self) -> str:
        return self.name


def same(ours: Items, theirs: Items) -> bool:
    """Whether all of `ours` are in `theirs`, bit for bit."""
    return all(
        ours[key].keys() == theirs[key].keys() and all(torch.equal(ours[key][name], theirs[key][name]) for name in ours[key])
        for key in ours
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("wanted", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_while_caching_lose_nothing_and_serve_nothing_half(tmp_path: Path, wanted: int, ranks: int) -> None:
    pictures, cache = pictures_in(tmp_path / "pictures", 60), tmp_path / "broken"
    began_s = time.monotonic()
    killed.cache_all(pictures, tmp_path / "unbroken")
    whole_s = time.monotonic() - began_s
    expected = served(tmp_path / "unbroken")
    assert len(expected) == 60 + 61

    seed = random.randrange(2**32)
    draw, kills, kept, finished = random.Random(seed), 0, Items(), 0
    command = [sys.executable, killed.__file__, str(pictures), str(cache)]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment(), "PYTHONPATH": root}
    ) as server:
        while kills < wanted:
            processes = asked(server, f"go {ranks}")
            time.sleep(draw.uniform(0, whole_s / 2))
            os.kill(processes.pop(draw.randrange(ranks)), signal.SIGKILL)
            if processes:  # the others work on or wait, until the launcher ends them
                time.sleep(draw.uniform(0, whole_s / 4))
                for process in processes:
                    os.kill(process, signal.SIGKILL)
            ended = asked(server, "ended?")
            assert set(ended) <= {0, signal.SIGKILL}, f"one failed by itself, seed {seed}"
            kills += signal.SIGKILL in ended
            now = served(cache)
            assert kept.keys() <= now.keys(), f"what was finished is lost, seed {seed}"
            assert same(now, expected), f"something else is served than was made, seed {seed}"
            kept = now
            if len(now) == len(expected):  # all is there: begin again
                killed.cache_all(pictures, cache)
                assert not list(cache.rglob(".*.tmp")), "what kills left half done is cleared away"
                shutil.rmtree(cache)
                kept, finished = {}, finished + 1
        asked(server, f"go {ranks + 1}")  # another number of processes takes over what these left
        assert set(asked(server, "ended?")) == {0}
    assert served(cache).keys() == expected.keys()
    assert same(expected, served(cache))
    assert finished < wanted, "most kills must find work to interrupt"


def asked(server: subprocess.Popen[str], word: str) -> list[int]:
    assert server.stdin
    assert server.stdout
    server.stdin.write(word + "\n")
    server.stdin.flush()
    return [int(number) for number in server.stdout.readline().split()]


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def opened(pictures: Path, cache: Path) -> None:
    entry = ImageDataset(id="cats", instance_data_dir=str(pictures), cache_dir_vae=str(cache))
    open_dataset(entry, killed.SPEC, tell=lambda event: None)


def test_a_disk_that_fills_while_caching_is_one_clear_error_and_what_fits_is_kept(tmp_path: Path) -> None:
    pictures, disk = pictures_in(tmp_path / "pictures", 60), tmp_path / "disk"
    killed.cache_all(pictures, tmp_path / "unbroken")
    with small_disk(disk, "size=1m"):
        with pytest.raises(SimpletunerError, match="disk is full") as caught:
            killed.cache_all(pictures, disk)
        assert (caught.value.exit_code, caught.value.problem.mend.startswith("Free some space")) == (1, True)
        kept = served(disk)
        assert kept
        remount(disk, "size=8m")
        killed.cache_all(pictures, disk)
        assert kept.keys() < served(disk).keys()
        assert same(served(tmp_path / "unbroken"), served(disk))


def test_a_disk_too_full_for_the_manifest_leaves_the_old_one(tmp_path: Path) -> None:
    pictures, disk = pictures_in(tmp_path / "pictures", 60), tmp_path / "disk"
    with small_disk(disk, "size=32k"):
        opened(pictures, disk)
        [manifest] = disk.glob("manifest-*")
        before = manifest.read_bytes()
        (disk / "filler").write_bytes(bytes(32 * 1024 - 4096 * (-(-len(before) // 4096))))
        (pictures / "picture_0.png").unlink()
        with pytest.raises(SimpletunerError, match="No space left on device"):
            opened(pictures, disk)
        assert manifest.read_bytes() == before
        assert {path.name for path in disk.iterdir()} == {manifest.name, "filler"}


def test_a_cache_folder_without_rights_is_told_before_any_work(tmp_path: Path, workspace: Workspace) -> None:
    with small_disk(tmp_path / "disk", "size=1m,ro"):
        workspace.datasets[0]["cache_dir_vae"] = str(tmp_path / "disk")
        said = workspace.run("train", "--validation_prompt=", expect=2)
        with pytest.raises(UserError, match="No permission to write"):  # and where prompts are kept
            killed.cache_all(pictures_in(tmp_path / "others", 2), tmp_path / "writable", text=tmp_path / "disk")
    assert "Traceback" not in said
    assert said.count("Read-only file system") == 1
    assert f"{tmp_path / 'disk'}/manifest-pictures" in said
    assert "make the folder writable, or set cache_dir_vae to another folder." in said


def test_a_disk_too_full_for_a_checkpoint_stops_the_run_with_the_last_one_whole(workspace: Workspace, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    workspace.datasets[0]["cache_dir_vae"] = str(tmp_path / "cache")
    workspace.datasets.append({"id": "text", "dataset_type": "text_embeds", "cache_dir": str(tmp_path / "text")})
    words = ["train", f"--output_dir={disk}", "--validation_prompt=", "--max_train_steps=4"]
    with small_disk(disk, "size=64k"):
        said = workspace.run(*words, expect=1)
        assert "Traceback" not in said
        assert said.count("could not be written") == 1
        assert "start the same command again" in said
        assert not list(disk.glob("checkpoint-*"))
        assert not list(disk.glob(".staging-*"))
        remount(disk, "size=64m")
        assert "pictures: 4 reused" in workspace.run(*words)
        assert load_file(disk / "pytorch_lora_weights.safetensors")


def test_a_spoilt_shard_is_set_aside_made_again_and_training_goes_on(workspace: Workspace) -> None:
    workspace.run("train", "--validation_prompt=", "--max_train_steps=2")
    cache = workspace.folder / "output" / "cache"
    spoilt = [next(cache.glob(f"{kind}/**/shard-*")) for kind in ("vae", "text")]
    whole = [path.read_bytes() for path in spoilt]
    for path in spoilt:
        os.truncate(path, path.stat().st_size - 5)
    said = workspace.run("train", "--validation_prompt=", "--max_train_steps=4")
    assert said.count("set aside") == 2
    assert "pictures: 0 reused, 4 encoded (not in the cache)" in said
    assert [path.read_bytes() for path in spoilt] == whole, "made again, bit for bit"
    assert all(path.with_name(path.name + ".broken").exists() for path in spoilt)
    assert max(workspace.losses()) == 4
