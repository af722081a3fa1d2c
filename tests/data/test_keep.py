"""What is encoded while training is kept within bounds, or lands in the cache."""

from __future__ import annotations

from pathlib import Path

import torch

from simpletuner.data.cache import Item, TensorCache, item_key
from simpletuner.data.keep import Memory, OnDisk
from simpletuner.data.samples import Recipe


def item(name: str, numbers: int = 4) -> Item:
    return item_key(name), {"latents": torch.full((numbers,), float(len(name)))}


def test_memory_forgets_the_oldest_first_and_whole_batches_at_a_time() -> None:
    memory = Memory(limit_bytes=4 * 16)
    memory.put([item("a"), item("b")])
    memory.put([item("c"), item("d")])
    memory.get(item_key("a"))  # now the newest
    memory.put([item("e")])
    assert [memory.has(item_key(name)) for name in "abcde"] == [True, True, False, False, True]
    assert memory.get(item_key("c")) is None


def test_memory_holds_the_last_batch_whatever_its_size() -> None:
    memory = Memory(limit_bytes=1)
    memory.put([item("a"), item("b")])
    assert memory.has(item_key("a"))
    assert memory.has(item_key("b"))


def test_what_is_on_its_way_to_disk_is_there_at_once_and_afterwards(tmp_path: Path) -> None:
    recipe = Recipe("vae", {})
    cache = TensorCache(tmp_path, recipe)
    with cache.writer(4) as writer:
        keep = OnDisk(cache, writer, is_shared=False)
        keep.put([item("a"), item("bb")])
        assert not cache.has(item_key("bb"))
        found = keep.get(item_key("bb"))
        assert found is not None
        assert found["latents"].tolist() == [2.0] * 4
    assert sorted(TensorCache(tmp_path, recipe).keys()) == sorted([item_key("a"), item_key("bb")])


def test_what_another_process_wrote_meanwhile_is_found(tmp_path: Path) -> None:
    recipe = Recipe("vae", {})
    cache = TensorCache(tmp_path, recipe)
    with cache.writer(1) as writer:
        keep = OnDisk(cache, writer, is_shared=True)
        with TensorCache(tmp_path, recipe).writer(1) as other:
            other.add([item("theirs")])
        assert not keep.has(item_key("theirs"))
        keep.put([item("mine")])
        assert keep.has(item_key("theirs"))
