"""The folder that ships: the parts in fp16 in the diffusers layout, and the recipe. Licences lie there already."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from miniature import denoiser, text

__all__ = ["FOLDER", "load_pair", "write", "write_recipe"]

FOLDER = Path(__file__).parents[2] / "simpletuner" / "examples" / "miniature"


def load_pair(work: Path, latent_channels: int) -> denoiser.Pair:
    text_encoder = text.build(AutoTokenizer.from_pretrained(work / "tokenizer"))
    text_encoder.load_state_dict(load_file(work / "text_encoder.safetensors"))
    transformer = denoiser.build(latent_channels, text_encoder.config.hidden_size)
    transformer.load_state_dict(load_file(work / "denoiser.safetensors"))
    return denoiser.Pair(transformer, text_encoder)


def write(vae: Any, work: Path, folder: Path = FOLDER) -> None:
    """Reads tokenizer, text encoder and denoiser from `work`; replaces the parts in `folder`, and only these."""
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    pair = load_pair(work, vae.config.latent_channels)
    # As the published repositories ship it.
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline: Any = SanaPipeline(tokenizer, pair.text_encoder, vae, pair.denoiser, scheduler)
    for part in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(folder)


def write_recipe(facts: dict[str, Any], folder: Path = FOLDER) -> None:
    """How it was made and what was measured, with the versions that made it and the sizes of what came of it."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")}
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}
    recipe = {"script": "tools/train_miniature.py", "versions": versions, **facts, "bytes": sizes}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
