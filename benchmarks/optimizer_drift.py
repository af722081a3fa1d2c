"""What bfloat16 does to each optimiser that keeps its weights in it: a Markdown table, for the docs. Seconds on a CPU.

Weights: 200 steps of 1e-4 times a fixed gradient from 1.0, where bfloat16's next number is 0.004 away. Second moment: what is
left of it after 2000 steps of zero gradient, at a decay rate of 0.999. Both beside the same in float32.
"""
# ruff: noqa: T201

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.sections import Optimizer
from simpletuner.training.optimizers import build_optimizer

BETA2 = 0.999


def trained(name: str, dtype: torch.dtype, *, rate: float, pushes: int, rests: int = 0) -> tuple[float, float | None]:
    """How far weights of 1.0 have moved, and the mean of the second moment, if the optimiser has one."""
    weight = nn.Parameter(torch.ones(4096, dtype=dtype))
    settings: dict[str, Any] = {"weight_decay": 0.0}
    if "betas" in OPTIMIZERS[name].settings:
        settings["betas"] = (*OPTIMIZERS[name].settings["betas"][:-1], BETA2)
    optimizer = build_optimizer(Optimizer(optimizer=name, learning_rate=rate, optimizer_config=settings), {"weight": weight})
    for number in range(pushes + rests):
        weight.grad = torch.full_like(weight, 1.0 if number < pushes else 0.0)
        optimizer.step()
    second = optimizer.state[weight].get("exp_avg_sq")
    moved = 1 - weight.detach().double().mean().item()
    return moved, None if second is None else second.double().mean().item()


def main() -> None:
    """Print the table."""
    print("| optimiser | weights moved in bf16 | true | second moment in bf16 | true |")
    print("|---|---|---|---|---|")
    for name, row in OPTIMIZERS.items():
        if row.trained_dtype != "bfloat16":
            continue
        cells = [f"`{name}`"]
        pairs = [
            [trained(name, dtype, rate=1e-4, pushes=200)[0] for dtype in (torch.bfloat16, torch.float32)],
            [trained(name, dtype, rate=1e-12, pushes=5, rests=2000)[1] for dtype in (torch.bfloat16, torch.float32)],
        ]
        for pair in pairs:
            cells += ["-" if value is None else f"{value:.4f}" for value in pair]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
