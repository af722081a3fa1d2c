"""The cache: what goes in comes out, only whole shards are served, and a failing disk is told plainly."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from simpletuner.data import cache as cache_module
from simpletuner.data.cache import Item, TensorCache, item_key
from simpletuner.data.samples import Recipe
from simpletuner.data.whole import this_machine
from simpletuner.errors import RunError
from simpletuner.events import Event, Notice

RECIPE = Recipe("dc-ae", {"weights": "abc", "dtype": "float32"})
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64]


def latents(*numbers: int) -> list[Item]:
    return [(item_key(n), {"latents": torch.full((4, 2, 3), float(n))}) for n in numbers]


def written(folder: Path, *batches: Sequence[Item], write_batch_size: int = 4) -> TensorCache:
    cache = TensorCache(folder, RECIPE)
    with cache.writer(write_batch_size) as writer:
        for batch in batches:
            writer.add(batch)
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted((folder / RECIPE.digest).glob("shard-*.safetensors"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "mask", "pooled", "latents"]),
            st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=3)),
            min_size=1,
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_what_goes_in_comes_out_in_every_dtype_and_shape(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[dict[str, tuple[torch.dtype, list[int]]]], write_batch_size: int
) -> None:
    items = [
        (item_key(n), {name: torch.randn(shape).mul(3).to(dtype) for name, (dtype, shape) in tensors.items()})
        for n, tensors in enumerate(wanted)
    ]
    folder = tmp_path_factory.mktemp("cache")
    mine = written(folder, *([item] for item in items), write_batch_size=write_batch_size)
    for cache in (mine, TensorCache(folder, RECIPE)):
        assert cache.keys() == sorted(key for key, _ in items)
        for key, tensors in items:
            got = cache.get(key)
            assert got.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert got[name].dtype == tensor.dtype
                assert torch.equal(got[name], tensor)


def test_shards_are_files_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    key, tensors = item_key("a"), {"prompt": torch.randn(3, 5).bfloat16(), "mask": torch.tensor([True, False, True])}
    written(tmp_path, [(key, tensors), *latents(1)])
    with safe_open(shards(tmp_path)[0], framework="pt") as file:
        assert torch.equal(file.get_tensor(f"{key}.prompt"), tensors["prompt"])
        assert torch.equal(file.get_tensor(f"{key}.mask"), tensors["mask"])
        assert len(file.keys()) == 3


def test_an_item_is_one_read_into_memory_that_its_tensors_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"mask": torch.ones(3, dtype=torch.bool), "prompt": torch.randn(3, 5), "ids": torch.arange(3)}
    cache = written(tmp_path, [(item_key("a"), tensors)])
    reads, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args) or preadv(*args))
    got = cache.get(item_key("a"))
    assert len(reads) == 1
    span = max(t.data_ptr() + t.nbytes for t in got.values()) - min(t.data_ptr() for t in got.values())
    assert span == sum(t.nbytes for t in tensors.values())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in got.values())


def test_an_empty_cache_has_nothing_and_leaves_no_trace(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "none", RECIPE)
    assert not cache.has(item_key(1))
    assert cache.held([item_key(1), item_key(2)]).tolist() == [False, False]
    assert cache.keys() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(KeyError):
        cache.get(item_key(1))


def test_held_answers_for_each_of_many_keys(tmp_path: Path) -> None:
    cache = written(tmp_path, latents(*range(0, 20, 2)), write_batch_size=3)
    assert cache.held([item_key(n) for n in range(20)]).tolist() == [n % 2 == 0 for n in range(20)]


def test_another_recipe_sees_nothing_and_the_recipe_is_told_beside_the_shards(tmp_path: Path) -> None:
    written(tmp_path, latents(1))
    other = Recipe("dc-ae", {"weights": "abc", "dtype": "float16"})
    assert not TensorCache(tmp_path, other).has(item_key(1))
    told = json.loads((tmp_path / RECIPE.digest / "recipe.json").read_text())
    assert Recipe(told["name"], told["facts"]).digest == RECIPE.digest


def test_a_shard_closes_at_the_write_batch_size_on_whole_encoder_batches(tmp_path: Path) -> None:
    written(tmp_path, latents(1, 2, 3), latents(4, 5, 6), latents(7), write_batch_size=4)
    counts = sorted(len(safe_open(path, framework="pt").keys()) for path in shards(tmp_path))
    assert counts == [1, 6]


@pytest.mark.parametrize("limit", [{"SHARD_BYTES": 100}, {"SHARD_SECONDS": 0.0}])
def test_a_shard_closes_early_when_it_is_large_or_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, float]
) -> None:
    for name, value in limit.items():
        monkeypatch.setattr(cache_module, name, value)
    written(tmp_path, latents(1, 2), latents(3), write_batch_size=100)
    assert len(shards(tmp_path)) == 2


def test_what_was_taken_is_written_although_the_block_is_left_by_an_error(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, RECIPE)

    def is_stopped() -> None:
        with cache.writer(100) as writer:
            writer.add(latents(1, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        is_stopped()
    assert TensorCache(tmp_path, RECIPE).held([item_key(1), item_key(2)]).all()


def test_what_another_process_wrote_is_seen_after_a_refresh(tmp_path: Path) -> None:
    ours = written(tmp_path, latents(1))
    written(tmp_path, latents(2))
    assert not ours.has(item_key(2))
    ours.refresh()
    assert ours.has(item_key(1))
    assert torch.equal(ours.get(item_key(2))["latents"], latents(2)[0][1]["latents"])


def test_an_item_in_two_shards_is_harmless(tmp_path: Path) -> None:
    written(tmp_path, latents(1, 2))
    cache = written(tmp_path, latents(2, 3))
    assert len(shards(tmp_path)) == 2
    assert cache.keys() == sorted(map(item_key, (1, 2, 3)))
    assert cache.get(item_key(2))["latents"].unique().tolist() == [2.0]


def test_many_shards_are_read_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_FILES", 3)
    cache = written(tmp_path, *(latents(n) for n in range(9)), write_batch_size=1)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for n in [*range(9), *range(9)]:
        assert cache.get(item_key(n))["latents"][0, 0, 0] == n
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def scrambled_header(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[20:40] = bytes(20)
    path.write_bytes(raw)


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def header_of_no_table(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 8) + b"[1,2,3] ")


def other_keys(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(item_key(1).encode(), item_key(99).encode()))


@pytest.mark.parametrize(
    "damage", [cut_short, grown, emptied, scrambled_header, endless_header, header_of_no_table, other_keys]
)
def test_a_damaged_shard_is_never_served_is_set_aside_and_told_and_the_rest_stays(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    written(tmp_path, latents(1, 2), latents(3), write_batch_size=1)
    victim = next(path for path in shards(tmp_path) if item_key(1).encode() in path.read_bytes())
    damage(victim)
    cache = TensorCache(tmp_path, RECIPE)
    assert cache.keys() == [item_key(3)]
    assert victim.exists(), "opening changes nothing on disk"
    told: list[Event] = []
    cache.set_aside(told.append)
    assert not victim.exists()
    assert victim.with_name(victim.name + ".broken").exists()
    [notice] = told
    assert isinstance(notice, Notice)
    assert notice.level == "warning"
    assert victim.name in notice.text
    with cache.writer(2) as writer:
        writer.add(latents(1, 2))
    assert TensorCache(tmp_path, RECIPE).keys() == sorted(map(item_key, (1, 2, 3)))


def test_a_shard_cut_short_while_in_use_is_an_error_and_not_half_an_item(tmp_path: Path) -> None:
    cache = written(tmp_path, latents(1))
    cut_short(shards(tmp_path)[0])
    with pytest.raises(RunError, match="cut short"):
        cache.get(item_key(1))


def test_a_cache_deleted_while_in_use_is_an_error_with_the_mend(tmp_path: Path) -> None:
    cache = written(tmp_path, latents(1))
    shards(tmp_path)[0].unlink()
    with pytest.raises(RunError, match="made again"):
        cache.get(item_key(1))


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "No permission"), (errno.EIO, "Cannot write")]
)
def test_a_failing_disk_is_one_clear_error_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    written(tmp_path, latents(1))

    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(RunError, match=words) as caught:
        written(tmp_path, latents(2))
    assert "is kept" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert TensorCache(tmp_path, RECIPE).keys() == [item_key(1)]
    assert not list((tmp_path / RECIPE.digest).glob(".*")), "the half-written file is gone"


def test_a_disk_that_is_truly_full_is_told_and_what_was_there_stays(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        written(tmp_path, latents(1))
        with pytest.raises(RunError, match="disk is full"):
            written(tmp_path, [(item_key(2), {"latents": torch.zeros(2**20)})])
        assert TensorCache(tmp_path, RECIPE).keys() == [item_key(1)]
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_leftovers_of_dead_writers_are_ignored_and_ours_are_removed(tmp_path: Path) -> None:
    folder = written(tmp_path, latents(1)).folder
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = this_machine()
    ours = folder / f".shard-0.safetensors.{host}.{gone.pid}.0a1b.tmp"
    alive = folder / f".shard-0.safetensors.{host}.{os.getppid()}.0a1b.tmp"
    theirs = folder / f".shard-0.safetensors.another-machine.{gone.pid}.0a1b.tmp"
    for path in (ours, alive, theirs):
        path.write_bytes(b"half a shard")
    assert written(tmp_path, latents(2)).keys() == sorted(map(item_key, (1, 2)))
    assert not ours.exists()
    assert alive.exists()
    assert theirs.exists()


def test_keys_are_the_same_on_every_machine_and_tell_words_apart() -> None:
    assert item_key("a cat", "cond") == "754a61ef89a39b82c444163b1eb603ed"
    assert item_key("undecodable \udcff")
    assert len({item_key("ab", "c"), item_key("a", "bc"), item_key("abc"), item_key(1), item_key("1")}) == 5


def test_a_hundred_thousand_items_are_found_quickly(tmp_path: Path) -> None:
    """The index answers in one vectorised look-up: a loop over items would take seconds."""
    cache = written(tmp_path, [(item_key(n), {"x": torch.zeros(1)}) for n in range(2000)], write_batch_size=500)
    keys = np.array([item_key(n).encode() for n in range(2000)] * 50)
    started_s = time.process_time()
    assert cache.held(keys).all()
    assert time.process_time() - started_s < 0.5


def test_reading_works_from_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_FILES", 2)
    cache = written(tmp_path, *(latents(n) for n in range(8)), write_batch_size=1)

    def first(n: int) -> Tensor:
        return cache.get(item_key(n % 8))["latents"][0, 0, 0]

    with ThreadPoolExecutor(8) as pool:
        assert [int(number) for number in pool.map(first, range(400))] == [n % 8 for n in range(400)]


def test_a_damaged_shard_that_was_made_again_meanwhile_stays(tmp_path: Path) -> None:
    written(tmp_path, latents(1))
    [victim] = shards(tmp_path)
    whole = victim.read_bytes()
    cut_short(victim)
    cache = TensorCache(tmp_path, RECIPE)
    victim.write_bytes(whole)
    cache.refresh()
    cache.set_aside(lambda event: None)
    assert cache.keys() == [item_key(1)]
    assert victim.exists()
