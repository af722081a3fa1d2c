"""The eval loss of every family: a denoiser that knows the picture has none, and one that is off by a half has a known one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.config.run import Run
from simpletuner.data.keep import Pending
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Embeds, Place, Prompt
from simpletuner.evaluation.eval_loss import Judge
from simpletuner.events import Event, Measured
from simpletuner.families import find
from simpletuner.families.base import ModelFamily
from simpletuner.training.state import TrainState
from tests.evaluation.eval_fakes import Pictures


class Machine(Alone):
    """An engine that has only a CPU."""

    def attention(self) -> Any:
        return nullcontext()

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor


class Weights:
    """Nothing is trained."""

    keeps_base = True

    def parameters(self) -> dict[str, Any]:
        return {}

    def disabled(self) -> Any:
        return nullcontext()

    evaluating = disabled


class Native(Pictures):
    """Two pictures of a family's own size and a wider one; they are all latents of ones."""

    def __init__(self, family: ModelFamily) -> None:
        super().__init__(count=3)
        edge, step = family.latent.native_edge_px, family.latent.alignment_px
        self.family, self.buckets = family, ((edge, edge), (edge + step, edge))

    def captions(self, sample: int) -> tuple[str, ...]:
        return ("a red square",)

    def place(self, sample: int) -> Place:
        size_WH = self.buckets[self.bucket_ids[sample]]
        return Place(size_WH, size_WH, (0, 0), size_WH)

    def get(self, sample: int) -> Tensor:
        return torch.ones(self.family.latent.channels, *self.family.latent.grid(*self.buckets[self.bucket_ids[sample]]))


@dataclass
class Encoded:
    embeds: Embeds

    def fetch(self, prompts: Sequence[Prompt]) -> Pending[list[Embeds]]:
        assert set(prompts) == {Prompt("a red square")}
        return Pending(lambda: [self.embeds for _ in prompts], is_ready=True)


@dataclass
class Oracle:
    """Answers rightly but for `error`, and takes only what the family's own denoiser would."""

    family: ModelFamily
    error: float
    state: TrainState

    engine, tuning, ema, optimizer, denoiser, is_done = Machine(), Weights(), None, None, None, False

    def predict(self, x_BCHW: Tensor, t_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert {len(part) for part in cond.values()} == {len(x_BCHW)}
        process, x0_BCHW = self.family.process, torch.ones_like(x_BCHW)
        return process.target(x0_BCHW, process.noise(x_BCHW, x0_BCHW, t_B), t_B) + self.error


@pytest.mark.parametrize("name", find())
def test_the_eval_loss_is_the_families_weight_times_the_squared_error(make_run: Callable[..., Run], name: str) -> None:
    run = make_run(name, eval_steps_interval=1, eval_timesteps=6, train_batch_size=2)
    family: Any = find()[name](run)
    embeds: Embeds = {}
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            embeds |= encode([Prompt("a red square")])[0]
    for error in (0.0, 0.5):
        measured = judged(run, family, embeds, error)
        times = [t for t, _ in measured.curves["eval_loss"]]
        expected = [error**2 * family.weight(torch.tensor([t])).item() for t in times]
        assert times == sorted(times)
        assert 0 < times[0] < times[-1] <= 1
        assert [loss for _, loss in measured.curves["eval_loss"]] == pytest.approx(expected, abs=1e-6, rel=1e-4)
        assert measured.figures["eval_loss"] == pytest.approx(fmean(expected), abs=1e-6, rel=1e-4)


def judged(run: Run, family: ModelFamily, embeds: Embeds, error: float) -> Measured:
    """What is told of a denoiser that is off by `error` everywhere."""
    pictures, told = Native(family), list[Event]()
    oracle: Any = Oracle(family, error, TrainState())
    oracle.tell = told.append
    Judge(run, [pictures], [pictures], Encoded(embeds), steps_per_epoch=Fraction(5)).run(oracle)  # type: ignore[arg-type,list-item]
    [measured] = [event for event in told if isinstance(event, Measured)]
    return measured
