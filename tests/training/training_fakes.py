"""A family, a stream and a run small enough to see through; the real ones have tests of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simpletuner.config import sections
from simpletuner.config.datasets import ImageDataset, TextEmbedsDataset
from simpletuner.config.options import Section
from simpletuner.config.run import Dtypes, Run
from simpletuner.data.samples import Batch, Cursor, MicroBatch
from simpletuner.diffusion.density import logit_normal
from simpletuner.diffusion.process import FlowMatching
from simpletuner.events import Event, Stepped
from simpletuner.families import common
from simpletuner.training.checkpoints import Checkpoints, find_checkpoint, restore
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning

EPOCH = 5
"""Micro-batches in an epoch of the stream."""


class Denoiser(nn.Module):
    """Linear layers by the names that adapters look for, and a dropout of its own as Cascade has."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, width)
        self.to_out = nn.ModuleList([nn.Linear(width, 4), nn.Dropout(0.3)])
        self.text = nn.Linear(4, width)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, text_BD: Tensor) -> Tensor:
        x_BHWC = x_BCHW.movedim(1, -1).to(self.to_q.weight.dtype)
        hidden_BHWD = self.to_q(x_BHWC) + (self.text(text_BD.to(x_BHWC)) + t_B.to(x_BHWC)[:, None])[:, None, None]
        return self.to_out[1](self.to_out[0](torch.tanh(hidden_BHWD))).movedim(-1, 1).float()


class Family:
    """What training asks of a family."""

    adapter_presets: ClassVar = {"attention": ("to_q", "to_out.0"), "text": ("text",)}
    lycoris_presets: ClassVar = {"attn-only": ("Linear",), "attn-mlp": ("Linear",), "full": ("Linear",)}
    process = FlowMatching()

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Denoiser().to(dtype).eval()

    def density(self, latent_HW: tuple[int, int]) -> Any:
        return logit_normal()

    def weight(self, t_B: Tensor) -> Tensor:
        return torch.ones_like(t_B)

    def adaptive_weights(self, device: str) -> Any:
        return None

    def predict(self, denoiser: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return denoiser(x_BCHW, t_B, cond["text_BD"])

    def save_adapter(self, weights: dict[str, Tensor], lora_config: dict[str, Any], folder: Path) -> Path:
        return common.save_adapter(weights, lora_config, folder, prefix="transformer")

    def load_adapter(self, path: Path) -> dict[str, Tensor]:
        return common.load_adapter(path, prefixes=("transformer",))

    def save_denoiser(self, weights: dict[str, Tensor], folder: Path) -> Path:
        return common.save_component(weights, {}, folder / "transformer")

    def load_denoiser_weights(self, folder: Path) -> dict[str, Tensor]:
        return common.read_weights(folder / "transformer")

    def save_pipeline(self, weights: dict[str, Tensor], folder: Path) -> None:
        self.save_denoiser(weights, folder)


def answer(denoiser: nn.Module) -> Tensor:
    """What a denoiser says of one fixed question."""
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 4, 3, 3, generator=generator),
        torch.rand(2, generator=generator),
        torch.randn(2, 4, generator=generator),
    )
    return denoiser(*inputs)


def base_answer(dtype: torch.dtype = torch.float32) -> Tensor:
    """Frozen as under an adapter: torch's CPU kernels for frozen and for trained weights differ in the last bit."""
    return answer(Family().load_denoiser(dtype).requires_grad_(False))


def stir(tuning: Any, strength: float = 1.0) -> None:
    """Move everything that is trained."""
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter.add_(strength * torch.randn(parameter.shape).to(parameter))


def make_batch(epoch: int, index: int, *, slot: int = 0, slots: int = 2, is_regularisation: bool = False) -> Batch:
    """Two samples that follow from (epoch, index) alone."""
    generator = torch.Generator().manual_seed(1000 * epoch + index)
    return Batch(
        latents_BCHW=torch.randn(2, 4, 3, 3, generator=generator),
        cond={"text_BD": torch.randn(2, 4, generator=generator)},
        files=(f"{epoch}-{index}-a.png", f"{epoch}-{index}-b.png"),
        is_regularisation=is_regularisation,
        micro=MicroBatch(0, (96, 96), (2 * index, 2 * index + 1), epoch, index),
        slot=slot,
        slots=slots,
    )


@dataclass
class Group:
    batches: Sequence[Batch]
    after: Cursor


@dataclass
class Stream:
    """Micro-batches dealt as `data/plan.py` deals them; each one of `regularisation` is flagged."""

    accumulation: int = 1
    rank: int = 0
    ranks: int = 1
    regularisation: tuple[int, ...] = ()
    asked: list[Cursor] = field(default_factory=list)

    def groups(self, cursor: Cursor) -> Iterator[Group]:
        self.asked.append(cursor)
        place = cursor.epoch * EPOCH + cursor.position
        while True:
            count = self.accumulation * self.ranks
            batches = [
                make_batch(
                    *divmod(place + nth, EPOCH),
                    slot=2 * nth,
                    slots=2 * count,
                    is_regularisation=(place + nth) in self.regularisation,
                )
                for nth in range(self.rank, count, self.ranks)
            ]
            place += count
            yield Group(batches, Cursor(*divmod(place, EPOCH)))


def make_run(folder: Path, **options: Any) -> Run:
    """A run of the given options; the rest as derived for a CPU."""
    options = {
        "model_family": "fake",
        "optimizer": "torch-adamw",
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "lora_rank": 2,
        "lora_alpha": 2.0,
        "mixed_precision": "no",
        "output_dir": str(folder),
        "log_step_interval": 1,
        "checkpoint_step_interval": 0,
        "seed": 7,
    } | options
    made: dict[str, Section] = {}
    for name, section in sections.SECTIONS.items():
        made[name] = section(**{key: options.pop(key) for key in list(options) if key in section.model_fields})
    family = options.pop("family", Section())
    trained = options.pop("trained", "float32")
    autocast = options.pop("autocast", None)
    assert not options, f"no such options: {options}"
    return Run(
        **made,
        family=family,
        datasets=(ImageDataset(id="pictures", instance_data_dir="pictures"),),
        text_embeds=TextEmbedsDataset(),
        dtypes=Dtypes(base=trained, trained=trained, autocast=autocast, text="float32", latents="float32"),
        sources={},
    )


@dataclass
class Told:
    """A sink that remembers."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.of(Stepped)}


@contextmanager
def trainer_of(
    run: Run,
    *,
    steps: int,
    stream: Any = None,
    jobs: Sequence[Any] = (),
    told: Told | None = None,
    family: Any = None,
    engine: Engine | None = None,
) -> Iterator[Trainer]:
    """A trainer on the fakes, ready to `fit`; it goes on from the newest checkpoint of its folder."""
    family, told = family or Family(), told or Told()
    config = {"learning_rate": run.optimizer.learning_rate, "data_backend_config": []}
    found = find_checkpoint(run, told)
    with nullcontext(engine) if engine else Engine(run) as engine:
        denoiser = family.load_denoiser(getattr(torch, run.dtypes.base))
        tuning = build_tuning(family, denoiser, run)
        accumulation = run.training.gradient_accumulation_steps
        stream = stream or Stream(accumulation, rank=engine.rank, ranks=engine.ranks)
        saving = Checkpoints(run, config)
        trainer = Trainer(run, engine, family, denoiser, tuning, stream, [saving, *jobs], told, steps=steps)
        if found:
            restore(found, trainer, config)
        yield trainer
