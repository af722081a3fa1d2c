"""Stage C LoRA files: no stock pipeline loads one, so this does; and their export to the keys of ComfyUI and OneTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.errors import UserError
from simpletuner.families import common
from simpletuner.families.base import StateDict

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PREFIX", "PREFIXES", "PRESETS", "export_comfyui", "load_stage_c_lora", "to_comfyui"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCKS = ("channelwise.0", "channelwise.4")
MAPPERS = ("mapper", "mapper_sca", "mapper_crp", "kv_mapper.1")
ENDS = ("clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding.1", "clf.1")
BETWEEN = ("down_downscalers.1.1.blocks.0", "up_upscalers.0.1.blocks.1")
"""1x1 convolutions where one level hands over to the other, of the same size."""
PRESETS = {
    "attention": ATTENTION,
    "blocks": BLOCKS,
    "mapper": MAPPERS,
    "full": (*ATTENTION, *BLOCKS, *MAPPERS, *ENDS, *BETWEEN),
}
"""`lora_target_preset` -> the ends of layers' names."""

PREFIX = "prior"
PREFIXES = (PREFIX, "unet")
"""Ours is the component's name in the prior's pipeline; some older files say `unet`."""

RENAMED = {f"attention.{name}": f"attention.attn.{name}" for name in ("to_q", "to_k", "to_v")}
RENAMED["attention.to_out.0"] = "attention.attn.out_proj"
"""Layers whose path in the authors' own code differs from diffusers'."""
HALVES = (".lora_A.weight", ".lora_B.weight")
MATRICES = {"lora_A": "lora_down", "lora_B": "lora_up"}


def load_stage_c_lora(pipeline: Any, path: str | Path, scale: float = 1.0) -> None:
    """Put a LoRA, a file or its folder, into the `prior` of a StableCascadePriorPipeline at `scale` of its strength.

    Call it once: a second call raises ValueError. Raises UserError if the file is no LoRA of this model.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    prior: nn.Module = pipeline.prior
    if any(isinstance(module, LoraLayer) for module in prior.modules()):
        raise ValueError("this pipeline holds a LoRA already: load the pipeline anew")
    weights = common.load_adapter(Path(path), prefixes=PREFIXES)
    facts = common.adapter_config(Path(path)) or _guessed(weights)
    _check_fit(prior, weights, path)
    inject_adapter_in_model(LoraConfig(**facts), prior)
    set_peft_model_state_dict(prior, weights)
    for module in prior.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)
    prior.to(next(prior.parameters()).device).requires_grad_(False).eval()


def export_comfyui(source: Path, target: Path) -> Path:
    """Write a Stage C LoRA of ours as ComfyUI, kohya's scripts and OneTrainer name it. Raises UserError."""
    weights = common.load_adapter(source, prefixes=PREFIXES)
    facts = common.adapter_config(source) or _guessed(weights)
    if facts.get("use_dora"):
        raise UserError(f"`{source}` is a DoRA, for which there are no such names.", mend="train a plain LoRA to export it.")
    if target.exists():
        raise UserError(f"`{target}` is there already.", why="nothing is overwritten.", mend="name a new file.")
    return common.write_safetensors(to_comfyui(weights, float(facts["lora_alpha"])), target, {"format": "pt"})


def to_comfyui(weights: StateDict, alpha: float) -> StateDict:
    """The same matrices under the other names, with an `alpha` beside each pair."""
    import torch

    renamed: StateDict = {}
    for name, tensor in weights.items():
        layer, matrix, _ = name.rsplit(".", 2)
        for ours, theirs in RENAMED.items():
            if layer.endswith(ours):
                layer = layer.removesuffix(ours) + theirs
        stem = f"lora_prior_unet_{layer.replace('.', '_')}"
        renamed[f"{stem}.{MATRICES[matrix]}.weight"] = tensor
        renamed[f"{stem}.alpha"] = torch.tensor(alpha, dtype=tensor.dtype)
    return renamed


def _check_fit(prior: nn.Module, weights: StateDict, path: str | Path) -> None:
    """Raises UserError unless every tensor finds its layer, of its width, and its other half. Before anything is changed."""
    from torch import nn

    shapes = {name: layer.weight.shape for name, layer in prior.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for name, tensor in weights.items():
        layer, _, part = name.partition(".lora_")
        if layer not in shapes or _width(part, tensor) != shapes[layer][1 if part == "A.weight" else 0]:
            raise UserError(
                f"`{path}` does not fit this prior: `{name}` {tuple(tensor.shape)} finds no layer of its width.",
                mend="load the prior that it was trained on: `prior`, or `prior_lite` for the flavour stage-c-lite.",
            )
    downs, ups = ({name.removesuffix(end) for name in weights if name.endswith(end)} for end in HALVES)
    if lonely := sorted(downs ^ ups):
        raise UserError(
            f"`{path}` is not whole: it holds one of two matrices of {', '.join(lonely[:3])}.",
            why="such a layer would stay as it is, silently.",
            mend="fetch the file again, or save it anew.",
        )


def _width(part: str, tensor: Tensor) -> int | None:
    """Inputs of a layer by its down projection, outputs by the up projection or DoRA's lengths; None of anything else."""
    if part == "magnitude_vector":
        return tensor.numel()  # in one dimension, or as a convolution's in four
    return {"A.weight": tensor.shape[1], "B.weight": tensor.shape[0]}.get(part) if tensor.ndim > 1 else None


def _guessed(weights: StateDict) -> dict[str, Any]:
    """The configuration of a file that brings none: alpha is taken to be the rank, as every loader does."""
    down = {name.removesuffix(".lora_A.weight"): tensor for name, tensor in weights.items() if ".lora_A." in name}
    rank = len(next(iter(down.values())))
    is_dora = any(".lora_magnitude_vector" in name for name in weights)
    return {"r": rank, "lora_alpha": rank, "target_modules": sorted(down), "use_dora": is_dora}
