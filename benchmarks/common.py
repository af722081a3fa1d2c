"""What the benchmarks share: fair timing on a busy machine, one way to tell figures, and a tiny Sana to work on.

Importing it sets one thread, here and in what is started. Absolute times say little on a shared machine; ratios of what was
measured in turns, within one run, do.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from simpletuner.config.datasets import ImageDataset, TextEmbedsDataset
from simpletuner.config.run import Dtypes, Run
from simpletuner.config.sections import SECTIONS
from simpletuner.families import find

__all__ = ["Figure", "arguments", "least_cpu_s", "made_run", "say", "scratch", "tell"]

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # for what is started
torch.set_num_threads(1)

DTYPES = {
    "no": Dtypes(base="float32", trained="float32", autocast=None, text="float32", latents="float32"),
    "bf16": Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16"),
}


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    most: float | None = None
    """Target: no more than this."""
    least: float | None = None
    """Target: no less than this."""

    @property
    def is_met(self) -> bool | None:
        """None where there is no target."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)


def arguments(description: str | None, **defaults: int) -> argparse.Namespace:
    """--json, and a whole number for each of `defaults`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    return parser.parse_args()


def least_cpu_s(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU seconds, threads included, that each piece of work took; they take turns, so a busy time hits all."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            began_s = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - began_s)
    return least


def tell(figures: Sequence[Figure], *, as_json: bool) -> None:
    """Print them for people, or as one JSON object."""
    if as_json:
        rows = [{**asdict(figure), "is_met": figure.is_met} for figure in figures]
        print(json.dumps({"version": 1, "date": date.today().isoformat(), "figures": rows}, indent=2))
        return
    for figure in figures:
        targets = [f"at most {figure.most:,g}"] if figure.most is not None else []
        targets += [f"at least {figure.least:,g}"] if figure.least is not None else []
        verdict = {True: "met", False: "MISSED", None: ""}[figure.is_met]
        print(f"{figure.name:<66}{figure.value:>12,.4g} {figure.unit:<12}{', '.join(targets):<18}{verdict}".rstrip())


def say(_event: object) -> None:
    """A sink for events that nobody wants to see."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the time of a benchmark."""
    with tempfile.TemporaryDirectory(prefix="simpletuner-benchmark-") as folder:
        yield Path(folder)


def made_run(model: Path, folder: Path, *, mixed_precision: str = "no", **options: Any) -> Run:
    """A LoRA run on the repository `model`, a Sana if not said otherwise, as derived for a CPU."""
    family = find()[options.get("model_family", "sana")]
    values = {
        "model_family": "sana",
        "pretrained_model_name_or_path": str(model),
        "mixed_precision": mixed_precision,
        "output_dir": str(folder),
        "optimizer": "torch-adamw",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "lora_rank": 4,
        "lora_alpha": 4.0,
        **family.defaults,
        **options,
    }
    for name in ImageDataset.model_fields:
        values.pop(name, None)
    sections = {}
    for name, section in {**SECTIONS, "family": family.Options}.items():
        sections[name] = section(**{key: values.pop(key) for key in list(values) if key in section.model_fields})
    assert not values, f"no such options: {values}"
    dtypes = DTYPES[mixed_precision]
    return Run(**sections, datasets=(), text_embeds=TextEmbedsDataset(), dtypes=dtypes, sources={})
