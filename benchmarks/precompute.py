"""Filling the caches, against the encoders alone: CPU time with tiny models, and how busy a slow encoder is kept.

The bare rates call the family's own encoder on ready batches of the same size. A device that works beside the CPU is stood for
by an encoder that sleeps: whatever it does not sleep, it waited for us.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Figure, arguments, least_cpu_s, made_run, say, scratch, tell
from PIL import Image

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.precompute import fill_latents
from simpletuner.data.prompts import PromptStore
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import LatentSpec, Prompt, Recipe
from simpletuner.examples.tiny import build_model
from simpletuner.families import load as load_family
from simpletuner.families.base import ModelFamily

EDGE_PX = 128
BATCH = 8


@dataclass
class Sleeper:
    """An encoder on another device: the CPU is free while it works, `work_s` for each item."""

    work_s: float
    answer: Callable[[Any], Any]
    slept_s: float = 0.0

    @property
    def recipe(self) -> Recipe:
        return Recipe("sleeper", {"weights": "none"})

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Any], Any]]:
        yield self.encode

    def encode(self, items: Any, keys: Sequence[str] = ()) -> Any:
        began_s = time.perf_counter()
        time.sleep(self.work_s * len(items))
        self.slept_s += time.perf_counter() - began_s
        return self.answer(items)


def painted(folder: Path, count: int) -> None:
    """Photographs of a little more than the trained size."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse_HWC = rng.integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(coarse_HWC).resize((192, 160)).save(folder / f"a_cat_{number}.jpg", quality=90)


def opened(folder: Path, cache: Path, latent: LatentSpec) -> ImageSet:
    entry = ImageDataset(
        id="cats", instance_data_dir=str(folder), resolution=EDGE_PX, crop=True, cache_dir_vae=str(cache), vae_batch_size=BATCH
    )
    return open_dataset(entry, latent, tell=say)


def latents_against_bare(family: ModelFamily, pictures: Path, folder: Path, rounds: int) -> list[Figure]:
    """CPU time with the real tiny encoder. Reading and decoding are work of their own: they are told beside."""
    counter = itertools.count()
    sets = [opened(pictures, folder / f"latents-{next(counter)}", family.latent) for _ in range(rounds)]
    count, waiting = len(sets[0]), iter(sets)
    encoder = family.image_encoder()
    pixels_B3HW = torch.rand(BATCH, 3, EDGE_PX, EDGE_PX) * 2 - 1
    keys = ["0"] * BATCH
    with encoder.lent("cpu") as encode:
        encode(pixels_B3HW, keys)

        def bare() -> None:
            for _ in range(count // BATCH):
                encode(pixels_B3HW, keys)

        @dataclass
        class Lent:
            recipe = encoder.recipe

            @contextmanager
            def lent(self, device: str) -> Iterator[Callable[[torch.Tensor, Sequence[str]], torch.Tensor]]:
                yield encode  # loaded already: loading is no part of either rate

        def ours() -> None:
            fill_latents([next(waiting)], Lent(), dtype="float32", device="cpu", ranks=Alone(), tell=say)

        def reading() -> None:
            from simpletuner.data.pixels import read_pixels

            for sample in range(count):
                read_pixels(sets[0].read(sample), sets[0].place(sample))

        seconds = least_cpu_s({"bare": bare, "reading": reading, "ours": ours}, rounds)
    return [
        Figure("latents, tiny DC-AE: bare encoder", count / seconds["bare"], "per CPU-s"),
        Figure("latents, tiny DC-AE: reading and decoding alone", count / seconds["reading"], "per CPU-s"),
        Figure("latents, tiny DC-AE: precompute", count / seconds["ours"], "per CPU-s"),
        Figure("latents, tiny DC-AE: precompute / bare encoder", seconds["bare"] / seconds["ours"], "", least=0.9),
        Figure(
            "latents, tiny DC-AE: precompute / (encoder + reading)",
            (seconds["bare"] + seconds["reading"]) / seconds["ours"],
            "",
        ),
    ]


def texts_against_bare(family: ModelFamily, folder: Path, rounds: int, count: int) -> list[Figure]:
    """CPU time with the real tiny encoder."""
    [encoder] = family.text_encoders()
    counter = itertools.count()
    prompts = [Prompt(f"a photo of cat number {number} in the green painting") for number in range(count)]
    with encoder.lent("cpu") as encode:
        encode(prompts[:BATCH])

        def bare() -> None:
            for start in range(0, count, BATCH):
                encode(prompts[start : start + BATCH])

        @dataclass
        class Lent:
            recipe = encoder.recipe

            @contextmanager
            def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Any]]]:
                yield encode

        def ours() -> None:
            store = stored(folder / f"text-{next(counter)}", encoder.recipe)
            store.fill(Lent(), prompts, device="cpu", ranks=Alone(), tell=say)

        seconds = least_cpu_s({"bare": bare, "ours": ours}, rounds)
    return [
        Figure("prompts, tiny Gemma: bare encoder", count / seconds["bare"], "per CPU-s"),
        Figure("prompts, tiny Gemma: precompute", count / seconds["ours"], "per CPU-s"),
        Figure("prompts, tiny Gemma: precompute / bare encoder", seconds["bare"] / seconds["ours"], "", least=0.9),
    ]


def stored(folder: Path, recipe: Recipe) -> PromptStore:
    return PromptStore(folder, [recipe], write_batch_size=128, text_encoder_batch_size=BATCH)


def busy(family: ModelFamily, pictures: Path, folder: Path, count: int) -> list[Figure]:
    """The share of the wall clock in which a device beside the CPU is at work, from its first batch to the last shard."""
    images = opened(pictures, folder / "sleeper", family.latent)
    rows, columns = family.latent.grid(EDGE_PX, EDGE_PX)
    by_image = Sleeper(0.02, lambda pixels_B3HW: torch.randn(len(pixels_B3HW), family.latent.channels, rows, columns))
    began_s = time.perf_counter()
    fill_latents([images], by_image, dtype="float16", device="cpu", ranks=Alone(), tell=say)
    figures = [Figure("latents: a device of 50 pictures/s is busy", by_image.slept_s / since(began_s), "", least=0.95)]

    def embeds(prompts: Sequence[Prompt]) -> list[dict[str, torch.Tensor]]:
        return [{"prompt_LD": torch.zeros(60, 2304, dtype=torch.bfloat16)} for _ in prompts]

    by_text = Sleeper(0.005, embeds)
    prompts = [Prompt(f"cat number {number}") for number in range(count)]
    store = stored(folder / "sleeper-text", by_text.recipe)
    began_s = time.perf_counter()
    store.fill(by_text, prompts, device="cpu", ranks=Alone(), tell=say)
    return [*figures, Figure("prompts: a device of 200 prompts/s is busy", by_text.slept_s / since(began_s), "", least=0.95)]


def since(began_s: float) -> float:
    return time.perf_counter() - began_s


def main() -> None:
    asked = arguments(__doc__, rounds=4, pictures=128, prompts=512)
    with scratch() as folder:
        build_model("sana", folder / "model")
        painted(folder / "pictures", asked.pictures)
        family = load_family(made_run(folder / "model", folder / "out"))
        figures = [
            *latents_against_bare(family, folder / "pictures", folder, asked.rounds),
            *texts_against_bare(family, folder, asked.rounds, asked.prompts),
            *busy(family, folder / "pictures", folder, asked.prompts),
        ]
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
