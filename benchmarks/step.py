"""A training step: ours, a bare hand-written loop's, and the stock LoRA script's, on one tiny Sana with one batch.

All three take turns within one run; CPU milliseconds, threads included. The real trainer runs here: what it does between two
steps (log points every ten, signals) is in its figure. Host synchronisations are counted in a pass of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Figure, arguments, made_run, say, scratch, tell
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.config.run import Run
from simpletuner.data.samples import Batch, Cursor, MicroBatch
from simpletuner.examples.tiny import build_model
from simpletuner.families import load as load_family
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning

LOG_EVERY = 10
MAX_NORM = 0.1


@dataclass
class Group:
    """What the trainer takes for one optimiser step."""

    batches: list[Batch]
    after: Cursor


@dataclass
class Turns:
    """The trainer's stream of batches. Each time it asks for the first group of a chunk, the rivals have their turn."""

    batch: Batch
    rivals: dict[str, Callable[[], None]]
    rounds: int
    chunk: int
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    """Of one step, by who took it."""

    def groups(self, cursor: Cursor) -> Generator[Group, None, None]:
        for turn in range(-1, self.rounds):  # the first turn warms up
            for name, step in self.rivals.items():
                with self._timed(name, turn):
                    for _ in range(self.chunk):
                        step()
            with self._timed("ours", turn):
                for _ in range(self.chunk):
                    yield Group([self.batch], Cursor())

    def ratio(self, one: str, other: str) -> float:
        """The median over all turns: a busy neighbour hits both of a turn."""
        return median(a / b for a, b in zip(self.cpu_ms[one], self.cpu_ms[other], strict=True))

    @contextmanager
    def _timed(self, name: str, turn: int) -> Iterator[None]:
        began_s = time.process_time()
        yield
        if turn >= 0:
            self.cpu_ms.setdefault(name, []).append((time.process_time() - began_s) * 1e3 / self.chunk)


def made_batch(family: Any, size: int) -> Batch:
    """Latents of the native size and prompts of 60 tokens, as the caches hand them over."""
    edge_px = family.latent.native_edge_px
    latents_BCHW = torch.randn(size, family.latent.channels, *family.latent.grid(edge_px, edge_px))
    width = family.denoiser_config["caption_channels"]
    cond = family.collate([{"prompt_LD": torch.randn(60, width)} for _ in range(size)], [])
    micro = MicroBatch(0, (edge_px, edge_px), tuple(range(size)), 0, 0)
    return Batch(latents_BCHW, cond, ("picture",) * size, False, micro, 0, size)


def bare_loop(run: Run, batch: Batch) -> Callable[[], None]:
    """Flow matching by hand over the same denoiser, adapters and optimiser: what no trainer can go below by much."""
    family = load_family(run)
    denoiser: Any = family.load_denoiser()
    parameters = list(build_tuning(family, denoiser, run).parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    dtype = denoiser.dtype
    x0_BCHW, prompt_BLD, mask_BL = batch.latents_BCHW, batch.cond["prompt_BLD"].to(dtype), batch.cond["mask_BL"]

    def step() -> None:
        noise_BCHW = torch.randn_like(x0_BCHW)
        t_B = torch.sigmoid(torch.randn(len(x0_BCHW)))
        t_B = 3 * t_B / (1 + 2 * t_B)
        t_B111 = t_B.view(-1, 1, 1, 1)
        x_BCHW = (1 - t_B111) * x0_BCHW + t_B111 * noise_BCHW
        answer_BCHW = denoiser(
            hidden_states=x_BCHW.to(dtype), encoder_hidden_states=prompt_BLD, encoder_attention_mask=mask_BL,
            timestep=t_B * 1000, return_dict=False,
        )[0]  # fmt: skip
        loss = (answer_BCHW.float() - (noise_BCHW - x0_BCHW)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def stock_loop(run: Run, batch: Batch) -> Callable[[], None]:
    """The stock LoRA scripts' step: PEFT, autocast, look-ups that wait for the device, AdamW that is not fused."""
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
    from peft import LoraConfig, inject_adapter_in_model

    family = load_family(run)
    denoiser: Any = family.load_denoiser()
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
    denoiser.requires_grad_(False)
    targets = list(family.adapter_presets["attention"])
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets), denoiser)
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    schedule = torch.linspace(1, 0.001, 1000)
    dtype = denoiser.dtype
    x0_BCHW, prompt_BLD, mask_BL = batch.latents_BCHW.to(dtype), batch.cond["prompt_BLD"].to(dtype), batch.cond["mask_BL"]

    def step() -> None:
        noise_BCHW = torch.randn_like(x0_BCHW)
        times_B = schedule[(torch.rand(len(x0_BCHW)) * 1000).long()]
        places = [(schedule == time_).nonzero()[0].item() for time_ in times_B]
        sigma_B = schedule[places].to(dtype)
        sigma_B111 = sigma_B.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            answer_BCHW = denoiser(
                hidden_states=(1 - sigma_B111) * x0_BCHW + sigma_B111 * noise_BCHW, encoder_hidden_states=prompt_BLD,
                encoder_attention_mask=mask_BL, timestep=sigma_B * 1000, return_dict=False,
            )[0]  # fmt: skip
        loss = ((answer_BCHW.float() - (noise_BCHW - x0_BCHW).float()) ** 2).reshape(len(x0_BCHW), -1).mean(1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()

    return step


class Syncs(TorchDispatchMode):
    """Counts the calls that would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@dataclass
class Watched:
    """Twenty steps whose host synchronisations are counted. In here: loading a model waits too, which is no matter."""

    batch: Batch
    syncs: int = 0

    def groups(self, cursor: Cursor) -> Generator[Group, None, None]:
        with Syncs() as mode:
            for _ in range(20):
                yield Group([self.batch], Cursor())
        self.syncs = mode.count


def trained(run: Run, stream: Turns | Watched) -> None:
    """Our trainer over `stream`, to its end."""
    family = load_family(run)
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, run)
    with Engine(run) as engine:
        Trainer(run, engine, family, denoiser, tuning, stream, [], say, steps=1_000_000).fit()


def measured(model: Path, folder: Path, precision: str, *, size: int, rounds: int, chunk: int) -> list[Figure]:
    run = made_run(
        model, folder, mixed_precision=precision, log_step_interval=LOG_EVERY, max_grad_norm=MAX_NORM, lora_dropout=0.0,
        gradient_checkpointing=False,
    )  # fmt: skip
    batch = made_batch(load_family(run), size)
    turns = Turns(batch, {"bare": bare_loop(run, batch), "stock": stock_loop(run, batch)}, rounds, chunk)
    trained(run, turns)
    name = f"step, {precision}, batch {size}"
    return [
        *(Figure(f"{name}: {who}", median(turns.cpu_ms[who]), "CPU ms") for who in ("ours", "bare", "stock")),
        Figure(f"{name}: ours / bare loop", turns.ratio("ours", "bare"), "", most=1.10),
        Figure(f"{name}: ours / stock script", turns.ratio("ours", "stock"), "", most=0.8),
    ]


def main() -> None:
    asked = arguments(__doc__, rounds=60, chunk=5, batch=1)
    figures = []
    with scratch() as folder:
        build_model("sana", folder / "model")
        for precision in ("bf16", "no"):
            figures += measured(
                folder / "model", folder / "out", precision, size=asked.batch, rounds=asked.rounds, chunk=asked.chunk
            )
        run = made_run(folder / "model", folder / "out", log_step_interval=1_000)
        watched = Watched(made_batch(load_family(run), asked.batch))
        trained(run, watched)
        figures.append(Figure("host synchronisations in 20 steps between log points", watched.syncs, "", most=0))
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
