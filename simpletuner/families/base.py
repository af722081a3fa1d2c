"""What a family is: one text-to-image architecture, in one file, holding no weights.

Encoders are lent by `with` blocks, so that the memory story shows as indentation. A family's file imports no torch at module
level (its options and defaults are read by `--help`): its methods import diffusers where they use it.
Shape letters:  B batch,  C latent channels,  H W latent rows and columns.  Time t is 0 for clean and 1 for noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.config.options import Section
from simpletuner.config.run import Run
from simpletuner.data.samples import Cond, Embeds, LatentSpec, PictureEncoder, Place, TextEncoder
from simpletuner.errors import Problem

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from simpletuner.diffusion.density import Density
    from simpletuner.diffusion.process import Process
    from simpletuner.diffusion.weighting import AdaptiveWeights
    from simpletuner.families.repository import Repository

__all__ = ["Flavour", "ModelFamily", "OnStep", "Shot", "StateDict"]

StateDict = dict[str, "Tensor"]
OnStep = Callable[[int, "Tensor"], None]
"""Told after each denoising step of a picture: steps done, latents (1, C, H, W)."""


@dataclass(frozen=True)
class Flavour:
    """A named checkpoint of a family."""

    repository: str
    native_edge_px: int
    note: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Option defaults that differ from the family's."""


@dataclass(frozen=True)
class Shot:
    """One picture of the gallery."""

    nickname: str
    index: int
    """The n-th prompt: 0 is the main one, the library follows."""
    prompt: str
    negative: str
    width_px: int
    height_px: int
    seed: int
    guidance: float
    steps: int
    adapter_strength: float = 1.0
    """How much the trained adapter counts: 1 as it is trained, 0 not at all."""
    settings: tuple[tuple[str, str], ...] = ()
    """What else it is made with that another gallery may be made without, for its metadata."""


class ModelFamily(ABC):
    """One text-to-image architecture: what it needs, how it sees prompts and pixels, what it predicts."""

    # facts of the class: no torch, no network
    title: ClassVar[str]
    flavours: ClassVar[Mapping[str, Flavour]]
    default_flavour: ClassVar[str]
    adapter_presets: ClassVar[Mapping[str, tuple[str, ...]]]
    """`lora_target_preset` -> names of the layers that get an adapter, as PEFT matches them (suffixes). Has "attention"."""
    lycoris_presets: ClassVar[Mapping[str, tuple[str, ...]]]
    """`apply_preset` of a LyCORIS config -> classes of the denoiser's modules. Has "attn-only", "attn-mlp" and "full"."""
    kept_whole: ClassVar[tuple[str, ...]]
    """Layers of the denoiser that a quantised base keeps in `base_model_default_dtype`: patterns (fnmatch) of their names."""
    keeps_attention: ClassVar[str] = "its attention calls PyTorch's kernels and no others."
    """Why its gallery cannot be painted by other packages' attention kernels (`config/catalogue.py`); "" if `sampler` can."""
    keeps_float32: ClassVar[bool] = False
    """Whether the denoiser stays in float32, with autocast, where `mixed_precision` asks for less."""
    has_tiles: ClassVar[bool] = True
    """Whether pictures are encoded or decoded in tiles with `vae_enable_tiling`."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Option defaults that differ for this family."""
    Options: ClassVar[type[Section]] = Section
    """The family's own options."""

    def __init__(self, run: Run) -> None:
        self.run = run

    # facts of an instance: from its options and the repository's small JSON files, never assumed
    @property
    @abstractmethod
    def latent(self) -> LatentSpec:
        """The grid of its latents."""

    @property
    @abstractmethod
    def process(self) -> Process:
        """How a clean latent is spoiled, and what the denoiser must answer."""

    @abstractmethod
    def needs(self) -> Sequence[tuple[Repository, str]]:
        """What a run reads of which repository: components by their sub-folder, and files that stand alone."""

    @abstractmethod
    def verify(self) -> None:
        """Raises UserError if a part of the model is missing or cut short. Fetches weights, loads none."""

    # preprocessing: lent, used, given back
    @abstractmethod
    def text_encoders(self) -> Sequence[TextEncoder]:
        """Used one after another, each over all prompts."""

    @abstractmethod
    def image_encoder(self) -> PictureEncoder:
        """What makes latents (B, C, H, W) of pixels."""

    def image_prompts(self) -> tuple[PictureEncoder, float] | None:
        """What also tells the denoiser of the picture itself, and of which share of samples, if the run asks for it.

        What it makes of a picture comes to `collate` as that sample's "image_D"; other samples have none.
        """
        return None

    # training
    @abstractmethod
    def load_denoiser(self, *, is_hollow: bool = False) -> nn.Module:
        """The denoiser in `run.dtypes.base` on the CPU, in eval mode, checkpointing set as `run.memory` says.

        `is_hollow`: on the meta device, without weights, from the repository's small files alone.
        """

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The repeated blocks in the order in which they run: what is checkpointed, compiled and offloaded one by one."""

    @abstractmethod
    def density(self, latent_HW: tuple[int, int]) -> Density:
        """Which times are trained, as an inverse CDF, for latents of this size."""

    def weight(self, t_B: Tensor) -> Tensor:
        """How much the loss at these times counts, (B,) float32: all alike, unless the family says otherwise."""
        return t_B.new_ones(t_B.shape)

    def adaptive_weights(self, device: str) -> AdaptiveWeights | None:
        """Weights that are learned while training, in place of `weight`, if the run asks for them."""
        return None

    @abstractmethod
    def collate(self, embeds: list[Embeds], places: list[Place]) -> Cond:
        """A batch of conditions."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Cond) -> Tensor:
        """The denoiser's answer (B, C, H, W) for float32 `x_BCHW` and `t_B`; only what enters the network is cast."""

    # hand-over
    @abstractmethod
    def sampler(
        self, denoiser: nn.Module, device: str
    ) -> AbstractContextManager[Callable[[Shot, Embeds, Embeds, OnStep | None], Tensor]]:
        """The stock pipeline round the live denoiser: (shot, cond, uncond, on_step) -> latents (1, C, H, W)."""

    @abstractmethod
    def image_decoder(self, device: str) -> AbstractContextManager[Callable[[Tensor, Embeds, Embeds], Image]]:
        """Latents (1, C, H, W), as trained on, the prompt's embeds and the negative prompt's -> a picture."""

    @abstractmethod
    def preview_decoder(self, device: str) -> AbstractContextManager[Callable[[Tensor], Image]]:
        """Latents in the making (1, C, H, W) -> a picture, quickly and roughly. Lent beside the denoiser."""

    def sampler_steps(self, shot: Shot) -> int:
        """How many denoising steps `sampler` takes for this picture, so many times it calls `on_step`."""
        return shot.steps

    @abstractmethod
    def save_adapter(self, weights: StateDict, lora_config: Mapping[str, Any], folder: Path) -> Path:
        """Writes `pytorch_lora_weights.safetensors`, as stock pipelines load it. Names come without the family's prefix."""

    @abstractmethod
    def load_adapter(self, path: Path) -> StateDict:
        """Reads what `save_adapter` wrote, from the file or its folder, prefix taken off."""

    @abstractmethod
    def save_denoiser(self, weights: StateDict, folder: Path) -> Path:
        """Writes the denoiser alone into its sub-folder of `folder` (a checkpoint of full tuning); returns the sub-folder."""

    @abstractmethod
    def load_denoiser_weights(self, folder: Path) -> StateDict:
        """Reads what `save_denoiser` wrote."""

    @abstractmethod
    def save_pipeline(self, weights: StateDict, folder: Path) -> None:
        """Writes a whole pipeline that `from_pretrained` loads: the base's parts with these denoiser weights."""

    @abstractmethod
    def usage(self, result: Path, prompt: str) -> str:
        """A few lines of Python that make a picture with `result`, the adapter's file or the pipeline's folder."""

    @abstractmethod
    def shot_defaults(self) -> tuple[float, int]:
        """(guidance, steps) of a picture where the user sets none."""

    def shot_guidance(self) -> float | None:
        """The guidance that an option of the family's own sets; it wins over `validation_guidance`. None: there is none."""
        return None

    def shot_settings(self) -> Mapping[str, Any]:
        """What else of the family's own options alters every picture, where they are set."""
        return {}

    @classmethod
    def check(cls, run: Run) -> Iterable[Problem]:
        """What is wrong with this run for this family; pure, no files, no network."""
        return ()

    @classmethod
    def notices(cls, run: Run) -> Iterable[str]:
        """What the user should know of this run with this family; pure, no files, no network."""
        return ()
