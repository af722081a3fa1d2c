"""Sets to judge by, for the family of `tests/training/training_fakes.py`: pictures of four channels, and no files."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from simpletuner.config.run import Run
from simpletuner.data.keep import Fetched, Pending
from simpletuner.data.samples import LatentSpec, Prompt
from simpletuner.evaluation.eval_loss import Judge
from tests.training.training_fakes import Family


class JudgedFamily(Family):
    """The fake family, with what judging asks of it besides."""

    latent = LatentSpec(channels=4, cell_px=8, alignment_px=8, native_edge_px=24)

    def collate(self, embeds: list[dict[str, torch.Tensor]], places: list[Any]) -> dict[str, torch.Tensor]:
        return {"text_BD": torch.stack([embed["text_D"] for embed in embeds])}


class Prompts:
    """Embeds that follow from the text alone."""

    def fetch(self, prompts: Sequence[Prompt]) -> Pending[list[dict[str, torch.Tensor]]]:
        return Pending(lambda: [{"text_D": torch.full((4,), float(len(prompt.text)))} for prompt in prompts], is_ready=True)


class Pictures:
    """A set and its latents at once: picture i of the first bucket but for every third one."""

    buckets = ((24, 24), (40, 24))

    def __init__(self, name: str = "held-out", count: int = 5, fill: float | None = None) -> None:
        self.entry = SimpleNamespace(id=name, dataset_type="eval", train_batch_size=None)
        self.bucket_ids = np.array([int(i % 3 == 2) for i in range(count)])
        self.dead: set[int] = set()
        self.fill = fill

    def alive(self) -> Any:
        return np.array([i for i in range(len(self.bucket_ids)) if i not in self.dead])

    def file(self, sample: int) -> str:
        return f"{sample}.png"

    def captions(self, sample: int) -> tuple[str, ...]:
        return ("a" * (sample + 1), "an alternative")

    def place(self, sample: int) -> None:
        return None

    def get(self, sample: int) -> torch.Tensor:
        width, height = self.buckets[self.bucket_ids[sample]]
        shape = (4, height // 8, width // 8)
        if self.fill is not None:
            return torch.full(shape, self.fill)
        return torch.randn(shape, generator=torch.Generator().manual_seed(sample)).half()

    def fetch(self, samples: Sequence[int]) -> Fetched:
        return Fetched(tuple(samples), Pending(lambda: [self.get(sample) for sample in samples], is_ready=True))


def judge_of(run: Run, sets: Sequence[Pictures]) -> Judge:
    return Judge(run, sets, sets, Prompts(), steps_per_epoch=Fraction(5))  # type: ignore[arg-type]
