"""A run: every option's value with where it came from, frozen. After this nothing asks whether an option is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.config.datasets import ConditioningDataset, ImageDataset, ImageEmbedsDataset, TextEmbedsDataset
from simpletuner.config.options import Section
from simpletuner.config.sections import (
    Adapter,
    Checkpointing,
    Data,
    Ema,
    EvalLoss,
    Flow,
    Hub,
    Kernels,
    Memory,
    Model,
    Objective,
    Optimizer,
    Precision,
    Previews,
    Reporting,
    Scores,
    Trackers,
    Training,
    Validation,
)

__all__ = ["Dtypes", "Hardware", "Run"]


@dataclass(frozen=True)
class Hardware:
    """What the defaults and rules need to know of the machine. Made by `training/engine.py`, which may ask torch."""

    device: str = "cpu"
    """`cpu`, `cuda` or `mps`."""
    has_bf16: bool = False
    """Whether bf16 arithmetic is native and advisable there (never on the CPU or on Apple)."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability, of NVIDIA cards only."""
    built_for: tuple[str, ...] = ()
    """Architectures whose kernels the installed torch has, as it names them ("sm_90", "compute_120")."""
    cuda_version: str | None = None
    """CUDA version of the installed torch ("13.0")."""
    name: str = ""
    """The card's own name."""
    memory_bytes: int | None = None
    """Of the card; None where there is none, or it is the machine's own."""


@dataclass(frozen=True)
class Dtypes:
    """Number formats, by torch's names. Derived from precision, optimiser and model type."""

    base: str
    """The denoiser's weights as loaded."""
    trained: str
    """The trained weights: an adapter's, or the denoiser's own in full tuning."""
    autocast: str | None
    """Autocast of the denoiser's forward, or None."""
    text: str
    """The text encoders' weights, and so the cached embeds."""
    latents: str
    """Cached latents."""


@dataclass(frozen=True)
class Run:
    """Everything a run was asked for."""

    model: Model
    adapter: Adapter
    training: Training
    optimizer: Optimizer
    ema: Ema
    precision: Precision
    memory: Memory
    kernels: Kernels
    flow: Flow
    objective: Objective
    data: Data
    checkpointing: Checkpointing
    validation: Validation
    eval_loss: EvalLoss
    previews: Previews
    scores: Scores
    reporting: Reporting
    trackers: Trackers
    hub: Hub
    family: Section
    """The family's own options."""
    datasets: tuple[ImageDataset, ...]
    """The enabled sets to train on, in the order of the file."""
    text_embeds: TextEmbedsDataset
    dtypes: Dtypes
    sources: Mapping[str, str]
    """Option -> where its value came from: "core", "family", "derived", "file config/config.json", "environment" or
    "command line". A dataset's are named "<id>.<key>"."""
    eval_datasets: tuple[ImageDataset, ...] = ()
    """The enabled sets to judge by, never trained on."""
    image_embeds: tuple[ImageEmbedsDataset, ...] = ()
    """The enabled places for latents; what they say is in the sets that use them (`cache_dir_vae`, `write_batch_size`)."""
    conditioning: tuple[ConditioningDataset, ...] = ()
    """The enabled sets of masks."""
    has_tiles: bool = True
    """Whether `vae_enable_tiling` changes anything: the family's."""
    hardware: Hardware = Hardware()
    """The machine that it was derived for."""
    notices: tuple[str, ...] = ()
    """What was decided for the user, to be told at start."""
    config_path: Path | None = None
    """The config file, if there was one."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Options (named as in `sources`) whose text holds `{env:NAME}`, as written: what may be shown and saved of them."""

    @property
    def picture_sets(self) -> tuple[ImageDataset, ...]:
        """Every set whose pictures are opened and encoded: those to train on, then those to judge by."""
        return self.datasets if self.eval_loss.eval_loss_disable else (*self.datasets, *self.eval_datasets)
