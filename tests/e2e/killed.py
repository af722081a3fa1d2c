"""Caches a folder again and again, each time in a process of its own that may be killed: what `test_faults.py` kills.

At the word "go" on stdin it answers with the number of a new process, at any other with how that one ended. Until then its
number can be no other's, so it is safe to kill.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpletuner.config.datasets import ImageDataset
from simpletuner.data import cache as cache_module
from simpletuner.data.index import open_dataset
from simpletuner.data.precompute import fill_latents
from simpletuner.data.prompts import PromptStore, training_prompts
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Embeds, LatentSpec, Prompt, Recipe
from simpletuner.data.shards import serialised

SPEC = LatentSpec(channels=4, cell_px=8, alignment_px=32, native_edge_px=64)
CALL_S = 0.003
"""What an encoder takes: long enough for a kill to find something to break."""
PIECE_S = 0.001


class Pictures:
    """An image encoder whose last bits depend on the batch, as a real one's do on a CPU."""

    recipe = Recipe("pictures", {})

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        kernel = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 7

        def encode(pixels_BCHW: Tensor, keys: Sequence[str]) -> Tensor:
            time.sleep(CALL_S)
            return torch.nn.functional.conv2d(pixels_BCHW, kernel, stride=8) * (1 + len(pixels_BCHW) * 1e-3)

        yield encode


class Texts:
    """A text encoder of the same kind."""

    recipe = Recipe("texts", {})

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        def encode(prompts: list[Prompt]) -> list[Embeds]:
            time.sleep(CALL_S)
            values = [float(sum(prompt.text.encode())) * (1 + len(prompts) * 1e-3) for prompt in prompts]
            return [{"prompt": torch.full((40, 256), value), "mask": torch.ones(40, dtype=torch.bool)} for value in values]

        yield encode


def cache_all(pictures: Path, cache: Path, text: Path | None = None) -> None:
    """Everything a run does before it trains."""
    entry = ImageDataset(
        id="cats", instance_data_dir=str(pictures), cache_dir_vae=str(cache / "vae"), vae_batch_size=2, write_batch_size=4
    )
    images = open_dataset(entry, SPEC, tell=lambda event: None)
    store = PromptStore(text or cache / "text", [Texts.recipe], write_batch_size=4, text_encoder_batch_size=2)
    store.fill(Texts(), training_prompts([images]), device="cpu", ranks=Alone(), tell=lambda event: None)
    fill_latents([images], Pictures(), dtype="float32", device="cpu", ranks=Alone(), tell=lambda event: None)


def slowly(items: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Any]:
    """A disk that takes its time over each tensor, so that kills find half a file."""
    for piece in serialised(items):
        yield piece
        time.sleep(PIECE_S)


def serve(pictures: Path, cache: Path) -> None:
    """One process, with all imports done, for every "go"."""
    cache_module.serialised = slowly  # type: ignore[assignment]
    process = 0
    for line in sys.stdin:
        if line != "go\n":
            tell(os.waitpid(process, 0)[1])
            continue
        process = os.fork()
        if process == 0:
            cache_all(pictures, cache)
            os._exit(0)
        tell(process)


def tell(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
