"""Caches a folder again and again, each time in a process of its own that may be killed: what `test_faults.py` kills.

At the word "go 2" on stdin it answers with the numbers of two new processes that share the work, at any other with how they
ended. Until then their numbers can be no others', so they are safe to kill.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from simpletuner.config.datasets import ImageDataset
from simpletuner.data import cache as cache_module
from simpletuner.data.index import open_dataset
from simpletuner.data.precompute import fill_latents
from simpletuner.data.prompts import PromptStore, training_prompts
from simpletuner.data.ranks import Alone, Ranks
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


class Sharing:
    """Processes that tell each other by files, as processes of several machines could. One that waits for a dead one waits."""

    def __init__(self, rank: int, ranks: int, folder: Path) -> None:
        self.rank = rank
        self.ranks = ranks
        self._folder = folder
        self._said = 0

    def barrier(self) -> None:
        """All have come here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value."""
        self._said += 1
        own = self._folder / f"{self._said}-{self.rank}"
        own.with_suffix(".new").write_text(json.dumps(value))
        own.with_suffix(".new").replace(own)
        others = [self._folder / f"{self._said}-{rank}" for rank in range(self.ranks)]
        while not all(path.exists() for path in others):
            time.sleep(0.001)
        return [json.loads(path.read_text()) for path in others]


def cache_all(pictures: Path, cache: Path, text: Path | None = None, ranks: Ranks | None = None) -> None:
    """Everything a run does before it trains."""
    ranks = ranks or Alone()
    entry = ImageDataset(
        id="cats", instance_data_dir=str(pictures), cache_dir_vae=str(cache / "vae"), vae_batch_size=2, write_batch_size=4
    )
    images = open_dataset(entry, SPEC, tell=lambda event: None)
    store = PromptStore(text or cache / "text", [Texts.recipe], write_batch_size=4, text_encoder_batch_size=2)
    store.fill(Texts(), training_prompts([images]), device="cpu", ranks=ranks, tell=lambda event: None)
    fill_latents([images], Pictures(), dtype="float32", device="cpu", ranks=ranks, tell=lambda event: None)


def slowly(items: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Any]:
    """A disk that takes its time over each tensor, so that kills find half a file."""
    for piece in serialised(items):
        yield piece
        time.sleep(PIECE_S)


def serve(pictures: Path, cache: Path) -> None:
    """Processes, with all imports done, for every "go"."""
    cache_module.serialised = slowly  # type: ignore[assignment]
    processes: list[int] = []
    for line in sys.stdin:
        if not line.startswith("go"):
            tell([os.waitpid(process, 0)[1] for process in processes])
            continue
        ranks, processes = int(line.split()[1]), []
        folder = Path(mkdtemp(dir=cache.parent))
        for rank in range(ranks):
            processes.append(os.fork())
            if processes[-1] == 0:
                cache_all(pictures, cache, ranks=Sharing(rank, ranks, folder))
                os._exit(0)
        tell(processes)


def tell(numbers: list[int]) -> None:
    sys.stdout.write(f"{' '.join(map(str, numbers))}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
