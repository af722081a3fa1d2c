"""Memory of a step, counted exactly: activations by checkpointing, trained weights by optimiser, frozen ones by format.

Peak bytes of forward and backward of a Sana of twelve blocks on the CPU, weights aside; they grow with width, tokens and batch
like a large one's. Bytes a trained weight: itself, its gradient and the optimiser's state after two steps. Bytes a frozen
weight: of a layer of Sana 1.6B's width, scales included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import Figure, arguments, made_run, scratch, tell
from diffusers import SanaTransformer2DModel
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.config.catalogue import OPTIMIZERS, PRECISIONS
from simpletuner.config.run import Run
from simpletuner.examples.tiny import build_model
from simpletuner.families import load as load_family
from simpletuner.networks.checkpointing import checkpoint_blocks
from simpletuner.networks.counting import PeakBytes
from simpletuner.networks.counting import stored_bytes as bytes_of
from simpletuner.networks.linear_attention import LinearAttention
from simpletuner.networks.quantise import quantise, stored_bytes
from simpletuner.training.optimizers import build_optimizer
from simpletuner.training.tuning import build_tuning

MIB = 2**20
TOKENS_EDGE = 16
"""Latent rows and columns: 512 px of a real Sana."""
WEIGHTS = 1 << 16
"""Size of the matrix that optimisers are weighed on; small ones some of them keep in full precision."""


def deep_sana(blocks: int) -> Any:
    """Sana in its real proportions, narrow."""
    model: Any = SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_layers=blocks, num_attention_heads=8, attention_head_dim=16,
        num_cross_attention_heads=4, cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=32, sample_size=4,
    ).eval()  # fmt: skip
    for block in model.transformer_blocks:
        block.attn1.set_processor(LinearAttention())
    return model


def step_peak(run: Run, interval: int | None, *, blocks: int, size: int) -> int:
    """Peak bytes of one forward and backward pass."""
    family: Any = load_family(run)
    denoiser = deep_sana(blocks)
    if interval is not None:
        checkpoint_blocks(denoiser, list(denoiser.transformer_blocks), interval)
    build_tuning(family, denoiser, run)
    cond = family.collate([{"prompt_LD": torch.randn(60, 32)} for _ in range(size)], [])
    x_BCHW, t_B = torch.randn(size, 32, TOKENS_EDGE, TOKENS_EDGE), torch.full((size,), 0.5)
    with PeakBytes() as counted:
        family.predict(denoiser, x_BCHW, t_B, cond).square().mean().backward()
    return counted.peak


def activations(model: Path, folder: Path, *, blocks: int, size: int) -> list[Figure]:
    """By checkpointing, for LoRA and full tuning; the second includes every weight's gradient."""
    figures = []
    for model_type in ("lora", "full"):
        run = made_run(model, folder, model_type=model_type, lora_dropout=0.0)
        ways = {"none": None, "every third block": 3, "every second block": 2, "every block": 1}
        peaks = {name: step_peak(run, interval, blocks=blocks, size=size) for name, interval in ways.items()}
        for name, peak in peaks.items():
            figures.append(Figure(f"peak of a step: {model_type}, checkpointing {name}", peak / MIB, "MiB"))
        most = 0.35 if model_type == "lora" else 0.6
        figures.append(
            Figure(f"peak of a step: {model_type}, every block / none", peaks["every block"] / peaks["none"], "", most)
        )
    return figures


def parameter_bytes(name: str, model: Path, folder: Path) -> float:
    """Bytes for each trained weight: itself, its gradient, the optimiser's state."""
    row = OPTIMIZERS[name]
    weight = nn.Parameter(torch.randn(256, WEIGHTS // 256).to(getattr(torch, row.trained_dtype)))
    optimizer = build_optimizer(made_run(model, folder, optimizer=name).optimizer, {"weight": weight})
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert weight.grad is not None
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    state = [part for value in state for part in parts(value)]
    return bytes_of([weight, weight.grad, *state]) / weight.numel()


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What holds the numbers: the tensor, or those that a quantised one wraps."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def frozen_bytes(precision: str) -> float:
    """Bytes for each frozen weight of a large layer."""
    layer = nn.Sequential(nn.Linear(2240, 5600, bias=False, dtype=torch.bfloat16))
    weights = layer[0].weight.numel()
    quantise(layer, precision)
    return stored_bytes(layer) / weights


def main() -> None:
    asked = arguments(__doc__, blocks=12, batch=2)
    torch.manual_seed(0)
    with scratch() as folder:
        build_model("sana", folder / "model")
        figures = activations(folder / "model", folder / "out", blocks=asked.blocks, size=asked.batch)
        for name in OPTIMIZERS:
            value = parameter_bytes(name, folder / "model", folder / "out")
            figures.append(Figure(f"bytes a trained weight under mixed_precision bf16: {name}", value, "bytes"))
    for precision in ("no_change", *PRECISIONS):
        figures.append(Figure(f"bytes a frozen weight: {precision}", frozen_bytes(precision), "bytes"))
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
