"""Many pictures: the scan of a folder, the index and the plan of a million samples, and random reads from a cache.

The scan is of real small JPEGs with EXIF orientation and caption files. The million is synthetic: no file of it exists.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from common import Figure, arguments, least_cpu_s, say, scratch, tell
from PIL import Image

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.cache import TensorCache, item_key
from simpletuner.data.discovery import TEXT_FILES, discover
from simpletuner.data.index import open_dataset
from simpletuner.data.manifest import Manifest, Texts, save_manifest
from simpletuner.data.plan import PlanSet, Stream
from simpletuner.data.samples import Cursor, LatentSpec, Recipe
from simpletuner.data.stores.folder import Folder

LATENT = LatentSpec(32, 32, 64, 1024)
ORIENTATION = 0x0112


def painted(folder: Path, count: int) -> None:
    """JPEGs with EXIF and captions, in ten sub-folders."""
    rng = random.Random(0)
    for number in range(count):
        place = folder / f"{number % 10}"
        if number < 10:
            place.mkdir(parents=True)
        exif = Image.Exif()
        exif[ORIENTATION] = number % 8 + 1
        size = rng.choice([(96, 64), (64, 96), (80, 80)])
        Image.new("RGB", size, (number % 256, 90, 40)).save(place / f"{number:06}.jpg", exif=exif)
        (place / f"{number:06}.txt").write_text(f"a photo of number {number}, by a river\n")


def scans(folder: Path, count: int, rounds: int) -> list[Figure]:
    pictures = folder / "pictures"
    painted(pictures, count)
    entry = ImageDataset(
        id="many", instance_data_dir=str(pictures), resolution=64, resolution_type="pixel", caption_strategy="textfile",
        cache_dir_vae=str(folder / "cache"),
    )  # fmt: skip
    latent = LatentSpec(32, 32, 32, 64)

    def scan() -> None:
        store = Folder(pictures)
        discover(store, store.listing(say), None, captions_from=TEXT_FILES, progress=lambda done, total: None)

    def first_start() -> None:
        for manifest in (folder / "cache").glob("*"):
            manifest.unlink()
        open_dataset(entry, latent, tell=say)

    def second_start() -> None:
        open_dataset(entry, latent, tell=say)

    seconds = least_cpu_s({"scan": scan, "first start": first_start, "second start": second_start}, rounds)
    return [
        Figure("scan with EXIF and captions", count / seconds["scan"], "files/CPU-s", least=20_000),
        Figure("first start: scan, buckets, ledger, manifest", count / seconds["first start"], "files/CPU-s"),
        Figure("second start, nothing changed", count / seconds["second start"], "files/CPU-s", least=100_000),
    ]


def synthetic(folder: Path, count: int) -> Manifest:
    """The manifest of pictures of thirty sizes, with captions of 60 letters."""
    rng = np.random.default_rng(0)
    sizes_N2 = rng.integers(1024, 2048, (30, 2), np.int32)
    stamps = np.arange(count, dtype=np.int64)
    return Manifest(
        root=str(folder.resolve()), captions_from=TEXT_FILES,
        files=Texts.of(f"folder/{number:09}.jpg" for number in range(count)),
        sizes=stamps, times=stamps, edges=sizes_N2[rng.integers(0, 30, count)], caption_sizes=stamps, caption_times=stamps,
        captions=Texts.of(f"a picture of the subject number {number:09}, by a river at dawn" for number in range(count)),
    )  # fmt: skip


def resident_bytes() -> int:
    """Of this process, now."""
    return psutil.Process().memory_info().rss


def opened_apart(folder: Path) -> tuple[float, float, np.ndarray, tuple[tuple[int, int], ...]]:
    """In a fresh process: CPU seconds and growth in bytes of opening the set; its buckets."""
    entry = ImageDataset(
        id="million", instance_data_dir=str(folder), caption_strategy="textfile", resolution=1024, resolution_type="pixel",
        skip_file_discovery="metadata", cache_dir_vae=str(folder / "cache"),
    )  # fmt: skip
    before, began_s = resident_bytes(), time.process_time()
    images = open_dataset(entry, LATENT, tell=say)
    return time.process_time() - began_s, resident_bytes() - before, images.bucket_ids, images.buckets


def plans(folder: Path, count: int, rounds: int) -> list[Figure]:
    save_manifest(synthetic(folder, count), folder / "cache" / "manifest-million.safetensors")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        opened_s, growth, bucket_ids, buckets = other.submit(opened_apart, folder).result()
    ids = np.arange(count)
    whole = PlanSet(ids, bucket_ids, buckets, 4)
    tenth = PlanSet(ids[: count // 10], bucket_ids[: count // 10], buckets, 4)

    late = replace(tenth, probability=0.5, first_step=1_000)

    def plan(*sets: PlanSet) -> None:
        next(Stream(sets, 0).groups(Cursor(), rank=0, ranks=1, accumulation=8))

    works = {"whole": partial(plan, whole), "tenth": partial(plan, tenth), "two": partial(plan, whole, late)}
    seconds = least_cpu_s(works, rounds)
    return [
        Figure(f"opening {count:,} samples from their manifest", opened_s, "CPU s"),
        Figure("index in memory, growth of the process", growth / count, "bytes/sample", most=400),
        Figure(f"plan of an epoch of {count:,}", seconds["whole"], "CPU s", most=2),
        Figure("the same beside a tenth of other probability that starts late", seconds["two"], "CPU s", most=2),
        Figure("plan: ten times the samples take", seconds["whole"] / seconds["tenth"], "times", most=13),
    ]


def tabled(folder: Path, count: int) -> None:
    """Empty files that a Parquet table tells captions and sizes of: nobody opens them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"{number // 10_000:04}/{number:09}" for number in range(count)]
    for number, name in enumerate(names):
        if number % 10_000 == 0:
            (folder / "pictures" / name).parent.mkdir(parents=True)
        os.close(os.open(folder / "pictures" / f"{name}.jpg", os.O_CREAT))
    edges_N2 = np.random.default_rng(0).integers(1024, 2048, (30, 2), np.int32)[np.arange(count) % 30]
    texts = [f"a picture of the subject number {number:09}, by a river at dawn" for number in range(count)]
    columns = {"id": names, "width": edges_N2[:, 0], "height": edges_N2[:, 1], "caption": texts, "other": texts}
    pq.write_table(pa.table(columns), folder / "table.parquet")


def opened_with_table(folder: Path) -> tuple[float, float, float]:
    """In a fresh process: seconds and CPU seconds of opening the set, and what it then holds, in bytes."""
    said = {"path": str(folder / "table.parquet"), "filename_column": "id", "caption_column": "caption"}
    entry = ImageDataset(
        id="million", instance_data_dir=str(folder / "pictures"), resolution=1024, resolution_type="pixel",
        metadata_backend="parquet", caption_strategy="parquet", cache_dir_vae=str(folder / "cache"),
        parquet={**said, "width_column": "width", "height_column": "height"},
    )  # fmt: skip
    import pyarrow.dataset  # noqa: F401  (its own size is not the samples')

    before, began_s, cpu_s = resident_bytes(), time.perf_counter(), time.process_time()
    images = open_dataset(entry, LATENT, tell=say)
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    assert len(images) == images.ledger.found > 0
    gc.collect()
    return took_s, cpu_s, resident_bytes() - before


def tables(folder: Path, count: int) -> list[Figure]:
    figures = []
    for share in (count // 4, count):
        place = folder / str(share)
        tabled(place, share)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            took_s, cpu_s, growth = other.submit(opened_with_table, place).result()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            again_s, _, _ = other.submit(opened_with_table, place).result()
        figures += [
            Figure(f"index of {share:,} from Parquet: first start", took_s, "s", most=60),
            Figure(f"index of {share:,} from Parquet: first start", cpu_s, "CPU s"),
            Figure(f"index of {share:,} from Parquet: second start", again_s, "s", most=60),
            Figure(f"index of {share:,} from Parquet: growth of the process", growth / share, "bytes/sample", most=400),
        ]
        shutil.rmtree(place)
    return figures


def reads(folder: Path, items: int, rounds: int) -> list[Figure]:
    cache = TensorCache(folder / "items", Recipe("benchmark", {}))
    keys = [item_key(number) for number in range(items)]
    latents_CHW = torch.randn(32, 32, 32, dtype=torch.float16)
    assert latents_CHW.nbytes == 64 * 2**10
    with cache.writer(512) as writer:
        for key in keys:
            writer.add([(key, {"latents": latents_CHW})])
    cache.refresh()
    asked = random.Random(0).sample(keys, len(keys))

    def read() -> None:
        for key in asked:
            cache.get(key)

    read()
    seconds = least_cpu_s({"read": read}, rounds)["read"]
    return [Figure(f"random read of a 64 KiB item, {items:,} in the cache, warm", seconds / items * 1e6, "CPU us", most=20)]


def main() -> None:
    asked = arguments(__doc__, rounds=5, files=10_000, samples=1_000_000, rows=1_000_000, items=4_096)
    with scratch() as folder:
        figures = [
            *scans(folder / "scan", asked.files, asked.rounds),
            *plans(folder / "plan", asked.samples, asked.rounds),
            *(tables(folder / "tables", asked.rows) if asked.rows else []),
            *reads(folder / "reads", asked.items, asked.rounds),
        ]
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
