"""What one training step costs, in counts that no busy machine can alter. Times are in `benchmarks/`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import diffusers
import peft
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.config.run import Dtypes, Run
from simpletuner.data.samples import Batch, Cursor, MicroBatch
from simpletuner.errors import RunError
from simpletuner.families import load as load_family
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning

GROWTH = 1.02
BF16 = Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16")
FLOAT32 = Dtypes(base="float32", trained="float32", autocast=None, text="float32", latents="float32")

VERSIONS = ("2.13", "0.42", "0.21")
"""Of torch, diffusers and peft, for which these counts hold."""
RECORDED = {
    ("no", 0.0): (1_090, 1_877_888),
    ("no", 0.1): (1_163, 2_461_568),
    ("bf16", 0.0): (1_179, 1_654_208),
}
"""(mixed_precision, lora_dropout) -> aten operators and bytes saved for backward, of one step of two pictures."""


@dataclass
class Group:
    batches: list[Batch]
    after: Cursor


class Operators(TorchDispatchMode):
    """Counts what is computed, and what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten"
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Watched:
    """A stream that counts what the trainer does between two of its groups."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.group = Group([batch], Cursor())
        self.steps = steps
        self.operators = self.syncs = 0
        self.saved: dict[int, int] = {}

    def groups(self, cursor: Cursor) -> Generator[Group, None, None]:
        yield self.group  # the first step makes the optimiser's state
        with Operators() as operators, saved_tensors_hooks(self._pack, lambda tensor: tensor):
            for _ in range(self.steps):
                yield self.group
        self.operators, self.syncs = operators.count, operators.syncs

    def _pack(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or not tensor.is_leaf:  # a weight is there anyway
            storage = tensor.untyped_storage()
            self.saved[storage.data_ptr()] = storage.nbytes()
        return tensor


def watched(run: Run, steps: int) -> Watched:
    """So many steps of the real trainer on the tiny Sana."""
    family: Any = load_family(run)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        latents_BCHW = torch.randn(2, family.latent.channels, 4, 4)
        cond = family.collate([{"prompt_LD": torch.randn(20, 32)} for _ in range(2)], [])
    batch = Batch(latents_BCHW, cond, ("a", "b"), False, MicroBatch(0, (128, 128), (0, 1), 0, 0), 0, 2)
    stream = Watched(batch, steps)
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, run)
    with Engine(run) as engine, pytest.raises(RunError, match="no dataset has anything left"):
        Trainer(run, engine, family, denoiser, tuning, stream, [], lambda event: None, steps=1_000).fit()
    return stream


@pytest.fixture
def made(make_run: Callable[..., Run], tmp_path: Any) -> Callable[..., Run]:
    def run(precision: str, dropout: float) -> Run:
        return make_run(
            "sana",
            dtypes=BF16 if precision == "bf16" else FLOAT32,
            mixed_precision=precision,
            output_dir=str(tmp_path),
            optimizer="torch-adamw",
            learning_rate=1e-3,
            lr_scheduler="constant",
            lr_warmup_steps=0,
            lora_rank=4,
            lora_dropout=dropout,
            log_step_interval=1_000,
            gradient_checkpointing=False,
        )

    return run


@pytest.mark.parametrize(("precision", "dropout"), RECORDED)
def test_a_step_computes_and_keeps_no_more_than_was_recorded(made, precision, dropout) -> None:
    versions = tuple(".".join(module.__version__.split(".")[:2]) for module in (torch, diffusers, peft))
    if versions != VERSIONS:
        pytest.skip(f"recorded for {VERSIONS}, not {versions}")
    stream = watched(made(precision, dropout), steps=1)
    operators, saved_bytes = RECORDED[precision, dropout]
    assert stream.operators <= operators * GROWTH, stream.operators
    assert sum(stream.saved.values()) <= saved_bytes * GROWTH, sum(stream.saved.values())


def test_nothing_waits_for_the_device_between_two_log_points(made) -> None:
    assert watched(made("bf16", 0.1), steps=3).syncs == 0


def test_the_count_of_waits_would_find_one() -> None:
    with Operators() as operators:
        torch.ones(1).item()
    assert operators.syncs == 1
