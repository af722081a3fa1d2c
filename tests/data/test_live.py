"""Latents made while training are a cache's to the bit, and a bad picture met on the way stops nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner.data.cache import TensorCache
from simpletuner.data.encoding import latent_recipe
from simpletuner.data.keep import Keep, Memory, OnDisk
from simpletuner.data.live import Fault, LiveLatents
from simpletuner.errors import RunError
from tests.data.test_precompute import TALL, WIDE, Convolution, Pictures, everything, fill, notices, picture

COUNT = 10


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def ten_pictures(folder: Path) -> Pictures:
    sizes = [TALL if n % 3 == 1 else WIDE for n in range(COUNT)]
    images: Any = Pictures(folder, [picture(n, size) for n, size in enumerate(sizes)], sizes=sizes)
    images.buckets = (WIDE, TALL)
    return images


def live(images: Any, encoder: Convolution, keep: Keep, pool: ThreadPoolExecutor) -> LiveLatents:
    with encoder.lent("cpu") as encode:
        recipe = latent_recipe(encoder, "float32")
        return LiveLatents(images, recipe, encode, torch.float32, keep=keep, pool=pool, tell=lambda event: None)


def test_latents_are_those_of_a_cache_to_the_bit(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images = ten_pictures(tmp_path)
    cached = everything(fill(images, Convolution())[0], images)
    store = live(images, Convolution(), Memory(), pool)
    order = [7, 0, 9, 1, 1, 4, 2, 3, 5, 6, 8]
    fetched = store.fetch(order)
    assert fetched.samples == tuple(order)
    assert not fetched.latents.is_ready
    for sample, latents in zip(order, fetched.latents.finish(), strict=True):
        assert torch.equal(latents, cached[sample])


def test_they_stay_so_when_memory_forgets(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images = ten_pictures(tmp_path)
    cached = everything(fill(images, Convolution())[0], images)
    encoder = Convolution()
    store = live(images, encoder, Memory(limit_bytes=1), pool)
    for sample in (0, 5, 0, 9, 5):
        assert torch.equal(store.get(sample), cached[sample])
    assert len(encoder.sizes) == 5, "nothing was kept"


def test_what_is_in_memory_is_neither_read_nor_encoded_again(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images, encoder = ten_pictures(tmp_path), Convolution()
    store = live(images, encoder, Memory(), pool)
    for _ in range(3):
        store.fetch(range(COUNT)).latents.finish()
    assert (images.reads, encoder.encoded) == (COUNT, COUNT)
    assert store.fetch([3]).latents.is_ready, "the reading thread has nothing to leave to the loop"


def test_nothing_is_encoded_by_the_thread_that_reads_ahead(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    encoder = Convolution()
    fetched = live(ten_pictures(tmp_path), encoder, Memory(), pool).fetch([0, 1])
    assert encoder.encoded == 0
    fetched.latents.finish()
    assert encoder.encoded > 0


def test_nothing_is_written_without_a_cache(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images = ten_pictures(tmp_path)
    store = live(images, Convolution(), Memory(), pool)
    store.get(0)
    store.save()
    assert (list(tmp_path.iterdir()), images.saves, images.memory) == ([], 0, {})


def test_a_cache_filled_on_demand_is_the_cache_that_is_filled_ahead(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    ahead, images = ten_pictures(tmp_path / "ahead"), ten_pictures(tmp_path / "live")
    cached = everything(fill(ahead, Convolution())[0], ahead)
    cache = TensorCache(images.cache_dir, latent_recipe(Convolution(), "float32"))
    with cache.writer(4) as writer:
        encoder = Convolution()
        store = live(images, encoder, OnDisk(cache, writer, is_shared=False), pool)
        store.fetch([8, 4, 0]).latents.finish()
        assert 0 < encoder.encoded < COUNT
        store.fetch(range(COUNT)).latents.finish()
        store.save()
    later, told = fill(images, Convolution())
    assert notices(told) == ["cats: 10 reused"]
    assert all(torch.equal(latents, cached[sample]) for sample, latents in everything(later, images).items())


def test_a_later_run_on_demand_reads_no_picture_again(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images = ten_pictures(tmp_path)
    fill(images, Convolution())
    reads, encoder = images.reads, Convolution()
    cache = TensorCache(images.cache_dir, latent_recipe(encoder, "float32"))
    with cache.writer(4) as writer:
        store = live(images, encoder, OnDisk(cache, writer, is_shared=False), pool)
        assert store.fetch(range(COUNT)).latents.is_ready
    assert (images.reads, encoder.encoded) == (reads, 0)


def test_the_next_readable_picture_of_the_bucket_stands_in_for_a_bad_one(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images = ten_pictures(tmp_path)
    images.raw[4] = b"no picture at all"
    images.raw[7] = b""
    store = live(images, Convolution(), Memory(), pool)
    tall = np.flatnonzero(images.bucket_ids).tolist()
    assert tall == [1, 4, 7]
    assert store.fetch([4, 0, 1]).samples == (1, 0, 1), "round to the first of the bucket"
    assert [(one.sample, one.reason, one.stand_in) for one in store.take_faults()] == [(4, "not a picture", 1)]
    fetched = store.fetch([7, 4])
    assert fetched.samples == (1, 1)
    assert torch.equal(*fetched.latents.finish())
    assert store.take_faults() == [Fault(7, "empty file", "0 bytes", 1)], "each is told once"


def test_which_one_stands_in_does_not_depend_on_what_was_read_before(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images = ten_pictures(tmp_path)
    images.raw[2] = images.raw[3] = b""
    chosen = []
    for order in ([2, 3, 9], [9, 3, 2], [2]):
        store = live(images, Convolution(), Memory(), pool)
        found = {sample: store.fetch([sample]).samples[0] for sample in order}
        chosen.append(found[2])
    assert set(chosen) == {5}


def test_a_bucket_without_a_readable_picture_ends_the_run_with_the_reason(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    images = ten_pictures(tmp_path)
    for sample in (1, 4, 7):
        images.raw[sample] = b""
    store = live(images, Convolution(), Memory(), pool)
    with pytest.raises(RunError, match=r"bucket 32x64 can be read.\n.*empty file"):
        store.fetch([4])
