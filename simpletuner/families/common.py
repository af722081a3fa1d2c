"""What several families do alike, as functions: loading whole models, lending them, and the files of adapters and weights.

No torch at module level: families' files import this one.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from simpletuner.config.catalogue import ATTENTION
from simpletuner.config.rules_attention import unfit_heads
from simpletuner.config.run import Run
from simpletuner.data.samples import LatentSpec
from simpletuner.errors import UserError
from simpletuner.families.base import Shot, StateDict
from simpletuner.families.repository import Component, Repository

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "ADAPTER_FILE",
    "SMALL_TILE_PX",
    "Lending",
    "adapter_alpha",
    "adapter_config",
    "adapter_file",
    "alignment_px",
    "evaluating",
    "flow_notices",
    "load_adapter",
    "load_scheduler",
    "load_whole",
    "lycoris_multiplier",
    "on_loan",
    "quiet",
    "read_weights",
    "save_adapter",
    "save_component",
    "starting_noise",
    "usage",
    "verify_attention",
    "verify_heads",
    "write_safetensors",
]

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
COMPONENT_FILE = "diffusion_pytorch_model.safetensors"
SMALL_TILE_PX = 512
"""Edge of an autoencoder's tiles with `vae_enable_tiling`."""

Model = TypeVar("Model", bound="nn.Module")


def alignment_px(native_edge_px: int, cell_px: int) -> int:
    """What bucket edges are multiples of: 64 px, or for a miniature an eighth of its edge; always whole latent cells.

    `cell_px` are the pixels of one cell as the denoiser sees it, patch included.
    """
    return max(cell_px, min(64 // cell_px, math.ceil(native_edge_px / 8 / cell_px)) * cell_px)


def load_whole(model_class: Any, component: Component, dtype: str) -> nn.Module:
    """A diffusers or transformers model, on the CPU in eval mode. Raises UserError where a weight is missing.

    The libraries would fill a missing weight with random numbers and a warning.
    """
    import torch
    from safetensors import SafetensorError

    number_format: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
    if model_class.__module__.startswith("transformers."):
        number_format = {"dtype": getattr(torch, dtype)}
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                component.folder,
                variant=component.variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **number_format,
            )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The model in `{component.folder}` cannot be loaded: {error}",
            mend="finish the download or copy of this folder, or choose another model.",
        ) from error
    wrong = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{len(wrong)} weights of {type(model).__name__} are missing in `{component.folder}`, or have another shape: "
            + ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else ""),
            why="the model would go on with random numbers in their place.",
            mend="finish the download or copy of this folder, or choose another model.",
        )  # fmt: skip
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Turns the libraries' progress bars over components and shards off; those of downloads have had their time."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    were_on = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    hub_was_off = are_progress_bars_disabled()
    for library in were_on:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in were_on:
            library.enable_progress_bar()
        if hub_was_off:
            disable_progress_bars()  # transformers' switch turns those of the hub on as well


@dataclass(frozen=True)
class Lending:
    """How an encoder's weights are kept while it is lent."""

    dtype: str
    precision: str = "no_change"
    """As `base_model_precision`, for its linear layers."""
    quantize_via: str = "accelerator"
    """`accelerator` quantises layer by layer on the device and leaves them there; the rest follows when the model is moved."""
    is_offloaded: bool = False
    """Weights stay on the CPU, and each layer's visit the device when it computes."""

    @classmethod
    def of_text(cls, run: Run, precision: str) -> Lending:
        """Of a text encoder, whose own precision is given."""
        return cls(run.dtypes.text, precision, run.precision.quantize_via, run.memory.offload_during_startup)

    @property
    def facts(self) -> dict[str, str]:
        """What of it alters embeds. The precision is said only where there is one: older caches were made without."""
        return {"dtype": self.dtype} | ({} if self.precision == "no_change" else {"precision": self.precision})

    def load(self, model_class: Any, component: Component, device: str) -> nn.Module:
        """As `load_whole`, and quantised. Raises UserError."""
        from simpletuner.networks.quantise import quantise

        model = load_whole(model_class, component, self.dtype)
        quantise(model, self.precision, device=device if self.quantize_via == "accelerator" else "cpu")
        return model


@contextmanager
def on_loan(load: Callable[[], Model], device: str, *, is_offloaded: bool = False) -> Iterator[Callable[[], Model]]:
    """Yields a function that gives the model, loaded at its first call; the model is gone after the block.

    `is_offloaded`: its weights stay on the CPU, and each layer's visit the device when it computes. What it is given is to
    lie on `device` either way.
    """
    import torch

    held: list[Model] = []

    def model() -> Model:
        if not held:
            loaded = load().requires_grad_(False)
            if is_offloaded:
                from diffusers.hooks import apply_group_offloading

                apply_group_offloading(loaded, torch.device(device), offload_type="leaf_level")
            held.append(loaded if is_offloaded else loaded.to(device))
        return held[0]

    try:
        yield model
    finally:
        was_used = bool(held)
        held.clear()
        if was_used:
            gc.collect()  # modules that refer to each other would keep the memory until some later collection
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            elif device.startswith("mps"):
                torch.mps.empty_cache()


def verify_heads(run: Run, width: int, repository: str) -> None:
    """Raises UserError if the attention kernels that paint the gallery cannot serve heads of this width."""
    if problem := unfit_heads(run.kernels.attention_mechanism, width, repository):
        raise UserError(problem.what, problem.why, problem.mend)


def verify_attention(run: Run) -> None:
    """Raises UserError if the package whose kernels paint the gallery is installed but broken: it is imported here.

    A build for another torch is no rarity, and the first gallery may be hours away.
    """
    mechanism = run.kernels.attention_mechanism
    if mechanism not in ATTENTION:
        return
    from diffusers.models.attention_dispatch import attention_backend

    row = ATTENTION[mechanism]
    try:
        with attention_backend(row.backend):
            pass
    except RuntimeError as error:
        what = f"`attention_mechanism={mechanism}` needs the package `{row.module}`, which cannot be used: {error}"
        raise UserError(what, "it may be built for another PyTorch or another CUDA.", row.pip) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards just those modules train that trained before."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def flow_notices(run: Run) -> Iterator[str]:
    """What the user should know of a flow family's noise levels."""
    if run.flow.flow_schedule_auto_shift:
        gallery = run.validation.validation_flow_shift
        own = "the scheduler's own, as the model ships it" if gallery is None else f"{gallery:g}"
        yield (
            f"flow_schedule_auto_shift: in training each bucket has its own shift, by its size, and flow_schedule_shift "
            f"{run.flow.flow_schedule_shift:g} is not used. The gallery's is {own}."
        )


def load_scheduler(repository: Repository, flow_shift: float | None) -> Any:
    """The scheduler that the repository ships, at another shift if one is given."""
    import diffusers

    config = repository.scheduler_config()
    if flow_shift is not None:
        config["flow_shift" if "flow_shift" in config else "shift"] = flow_shift  # DPMSolver's name for it, FlowMatchEuler's
        config["use_dynamic_shifting"] = False  # else the size of the picture would decide
    return getattr(diffusers, config["_class_name"]).from_config(config)


def starting_noise(shot: Shot, latent: LatentSpec) -> Tensor:
    """(1, C, H, W) float32 on the CPU, as the stock pipelines draw it from a generator there: the same on every device."""
    import torch

    rows, columns = latent.grid(shot.width_px, shot.height_px)
    return torch.randn((1, latent.channels, rows, columns), generator=torch.Generator("cpu").manual_seed(shot.seed))


def save_adapter(weights: StateDict, lora_config: Mapping[str, Any], folder: Path, *, prefix: str) -> Path:
    """Writes a LoRA as diffusers' `save_lora_weights` does: names under the component's prefix, the LoRA config beside.

    Another prefix would load nothing, silently; without the config a loader takes alpha for the rank.
    """
    config = {f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value for key, value in lora_config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
    return write_safetensors({f"{prefix}.{name}": tensor for name, tensor in weights.items()}, folder / ADAPTER_FILE, metadata)


def load_adapter(path: Path, *, prefixes: tuple[str, ...]) -> StateDict:
    """Reads a LoRA from its file or folder, the prefix taken off. Raises UserError."""
    from safetensors.torch import load_file

    file = adapter_file(path)
    weights = {}
    for name, tensor in load_file(file).items():
        prefix = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), None)
        if name.startswith("lycoris_"):
            raise UserError(
                f"`{file}` is a LyCORIS adapter, not a LoRA: it holds `{name}`.",
                mend='set "lora_type" to "lycoris", with the `lycoris_config.json` beside the file as "lycoris_config".',
            )
        if prefix is None or ".lora_" not in name:
            raise UserError(
                f"`{file}` is not a LoRA of this model: it holds `{name}`.",
                why=f"its names are expected to begin with {' or '.join(f'`{prefix}.`' for prefix in prefixes)} and to end in "
                "`.lora_A.weight` or `.lora_B.weight`.",
                mend="choose an adapter that was trained on this family and saved in the diffusers layout.",
            )
        weights[name.removeprefix(f"{prefix}.")] = tensor
    return weights


def adapter_config(path: Path) -> dict[str, Any]:
    """The LoRA configuration that `save_adapter` put beside the weights, the prefix taken off; {} if there is none."""
    from safetensors import safe_open

    with safe_open(adapter_file(path), "pt") as file:
        config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {key.rpartition(".")[2]: value for key, value in config.items()}


def adapter_alpha(path: Path) -> float | None:
    """The alpha that a LoRA was trained with; None if its file, or folder, does not say. Raises UserError."""
    return adapter_config(path).get("lora_alpha")


def adapter_file(path: Path) -> Path:
    """The file of an adapter named by it or by its folder. Raises UserError."""
    file = path / ADAPTER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"There is no adapter at `{file}`.", mend=f"name a `{ADAPTER_FILE}`, or the folder that holds it.")
    return file


def save_component(weights: StateDict, config: Mapping[str, Any], folder: Path) -> Path:
    """Writes one component as diffusers' `save_pretrained` does: a configuration and one file of weights."""
    write_safetensors(weights, folder / COMPONENT_FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return folder


def read_weights(folder: Path) -> StateDict:
    """All tensors of the safetensors files in a folder. Raises UserError."""
    from safetensors.torch import load_file

    files = Component(folder, None).weights if folder.is_dir() else []
    if not files:
        raise UserError(f"There are no safetensors weights in `{folder}`.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write_safetensors(weights: StateDict, path: Path, metadata: Mapping[str, str]) -> Path:
    """Writes the file beside its place, then moves it there: it is never half a file, and an old one is lost only then."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, staged, metadata=dict(metadata))
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def usage(
    pipeline: str,
    repository: Repository,
    result: Path,
    arguments: str,
    *,
    transformer: str = "",
    multiplier: float | None = None,
) -> str:
    """A few lines of Python that make a picture with `result`, an adapter's file or a whole pipeline's folder.

    `transformer` is Python that makes the base's denoiser, where that is not the repository's: "Class.from_...(...)".
    With a `multiplier` the adapter is a LyCORIS, which its library puts into the denoiser.
    """
    is_adapter = result.suffix == ".safetensors"
    lines = [f"from diffusers import {pipeline}"]
    base = repository.arguments if is_adapter else repr(str(result))
    if transformer and is_adapter:
        lines = [f"from diffusers import {transformer.partition('.')[0]}, {pipeline}"]
        base += f", transformer={transformer}"
    if multiplier is not None:
        lines.append("from lycoris import create_lycoris_from_weights")
    lines.append(f"pipeline = {pipeline}.from_pretrained({base})")
    if multiplier is not None:
        lines.append(f"network, _ = create_lycoris_from_weights({multiplier:g}, {str(result)!r}, pipeline.transformer)")
        lines.append("network.apply_to()")
    elif is_adapter:
        lines.append(f"pipeline.load_lora_weights({str(result)!r})")
    return "\n".join([*lines, f"pipeline({arguments}).images[0].save('picture.png')"])


def lycoris_multiplier(run: Run, presets: Mapping[str, Sequence[str]]) -> float | None:
    """How much a LyCORIS adapter counts; None if the run trains none. `presets` are the family's."""
    from simpletuner.config.lycoris import effective

    is_lycoris = run.model.model_type == "lora" and run.adapter.lora_type == "lycoris"
    return effective(run.adapter, presets)["multiplier"] if is_lycoris else None
