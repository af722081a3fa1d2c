"""A trainer as far as a gallery sees it, and a family whose pictures tell how the model stood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Prompt
from simpletuner.events import Event
from simpletuner.families.base import Shot
from simpletuner.training.state import TrainState

SHOT = Shot("cat", 0, "a cat", "", 64, 32, seed=7, guidance=4.5, steps=2)
THREE = tuple(replace(SHOT, nickname=f"cat {index}", prompt=f"cat {index}", index=index) for index in range(3))


class FakeEngine(Alone):
    device = "cpu"

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def attention(self) -> AbstractContextManager[None]:
        return nullcontext()


class FakeTuning:
    """Notes how the model stands while something is sampled."""

    keeps_base = True

    def __init__(self) -> None:
        self.standing = "training"
        self.strength = 1.0

    @contextmanager
    def _as(self, standing: str) -> Iterator[None]:
        self.standing = standing
        yield
        self.standing = "training"

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def disabled(self) -> Any:
        return self._as("base")

    def evaluating(self) -> Any:
        return self._as("evaluating")

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        self.strength = strength
        yield
        self.strength = 1.0


class FakeEma:
    def __init__(self, tuning: FakeTuning) -> None:
        self.tuning = tuning

    @contextmanager
    def applied(self) -> Iterator[None]:
        assert self.tuning.standing == "evaluating"
        self.tuning.standing = "average"
        yield
        self.tuning.standing = "evaluating"


class FakeFamily:
    """Renders flat pictures whose red tells the standing of the model; draws from the global generator as libraries do."""

    def __init__(self, tuning: FakeTuning) -> None:
        self.tuning = tuning
        self.sampled: list[tuple[str, str, str]] = []
        self.is_sampling = False

    @contextmanager
    def sampler(self, denoiser: Any, device: str) -> Iterator[Callable[..., torch.Tensor]]:
        def sample(shot: Shot, cond: str, uncond: str, on_step: None) -> torch.Tensor:
            self.sampled.append((self.tuning.standing, cond, uncond))
            assert not torch.is_grad_enabled()
            return torch.full(
                (1, 1, 1, 1), {"base": 10.0, "evaluating": 200.0, "average": 100.0}[self.tuning.standing]
            ) + 0 * torch.rand(1)

        self.is_sampling = True
        yield sample
        self.is_sampling = False

    @contextmanager
    def image_decoder(self, device: str) -> Iterator[Callable[..., Image.Image]]:
        assert not self.is_sampling, "denoiser and decoder are needed at once"
        yield lambda latents, cond, uncond: Image.new("RGB", (64, 32), (int(latents.item()), 0, 0))


class FakePrompts:
    def get(self, prompt: Prompt) -> str:
        return f"{prompt.role}:{prompt.text}"


def trainer_of(told: list[Event], engine: Any) -> Any:
    tuning = FakeTuning()
    return SimpleNamespace(
        engine=engine,
        tuning=tuning,
        ema=FakeEma(tuning),
        family=FakeFamily(tuning),
        denoiser=None,
        optimizer=torch.optim.SGD([torch.zeros(1)]),
        state=TrainState(),
        is_done=False,
        tell=told.append,
    )
