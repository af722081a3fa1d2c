"""Half precision with a small range: the loss is scaled, and a step that overflows is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_fakes import Family, Group, Told, make_batch, make_run, trainer_of

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.run import Dtypes, Run
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Batch, Cursor, MicroBatch
from simpletuner.errors import RunError
from simpletuner.events import Notice, Stepped
from simpletuner.families import load as load_family
from simpletuner.training.engine import Engine
from simpletuner.training.meter import MOST_SKIPPED, Meter
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning

FLOAT32 = Dtypes(base="float32", trained="float32", autocast=None, text="float32", latents="float32")
FP16 = {
    "lora": Dtypes(base="float16", trained="float32", autocast=None, text="float32", latents="float16"),
    "full": Dtypes(base="float32", trained="float32", autocast="float16", text="float32", latents="float16"),
}

TIME = torch.full((2,), 0.5)


class Overflowing(Family):
    """Answers something whose gradient leaves float16's range in chosen calls, while the loss stays finite."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.asked = calls, 0

    def predict(self, denoiser: Any, x_BCHW: Tensor, t_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
        answer_BCHW = super().predict(denoiser, x_BCHW, t_B, cond)
        self.asked += 1
        if self.asked in self.calls:
            answer_BCHW.register_hook(lambda gradient: gradient * math.inf)
        return answer_BCHW


def steps_of(run: Run, family: Family, steps: int) -> tuple[list[dict[str, Tensor]], list[float], Told]:
    """Weights after each step, the scale after it, and what was told."""
    told = Told()
    weights: list[dict[str, Tensor]] = []
    scales: list[float] = []
    with trainer_of(run, steps=steps, told=told, family=family) as trainer:

        def note(event: Any) -> None:
            told(event)
            if isinstance(event, Stepped):
                weights.append(trainer.tuning.weights())
                scales.append(trainer.engine.scaler_state()["scale"])

        trainer.tell = note
        trainer.fit()
    return weights, scales, told


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["torch-adamw", "adamw_bf16"])
def test_a_step_that_overflows_is_skipped_the_scale_is_halved_and_training_goes_on(tmp_path: Path, optimizer: str) -> None:
    run = make_run(tmp_path, mixed_precision="fp16", optimizer=optimizer)
    weights, scales, told = steps_of(run, Overflowing(2), 4)
    assert scales == [65536, 32768, 32768, 32768]
    assert equal(weights[0], weights[1])
    assert not equal(weights[1], weights[2])
    assert not equal(weights[2], weights[3])
    assert [event.extra["skipped_steps"] for event in told.of(Stepped)] == [0, 1, 0, 0]
    assert [math.isnan(event.grad_norm) for event in told.of(Stepped)] == [False, True, False, False]
    assert sum("1 step was skipped up to step 2" in notice.text for notice in told.of(Notice)) == 1


@pytest.fixture
def _unwritten_memory_is_no_number() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it so
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_unwritten_memory_is_no_number")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_begins_well_after_a_first_step_that_was_skipped(tmp_path: Path, optimizer: str) -> None:
    run = make_run(tmp_path, mixed_precision="fp16", optimizer=optimizer, learning_rate=OPTIMIZERS[optimizer].rate or 1e-3)
    weights, _, _ = steps_of(run, Overflowing(1), 3)
    assert not equal(weights[0], weights[2])
    assert all(torch.isfinite(tensor).all() for tensor in weights[2].values())


def test_the_norm_that_is_told_and_clipped_is_the_true_one(tmp_path: Path) -> None:
    norms = []
    for mixed in ("no", "fp16"):
        told = Told()
        run = make_run(tmp_path / mixed, mixed_precision=mixed, max_grad_norm=1e-3)
        with trainer_of(run, steps=3, told=told) as trainer:
            trainer.fit()
        norms.append([event.grad_norm for event in told.of(Stepped)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_nothing_is_scaled_without_fp16(tmp_path: Path) -> None:
    for mixed in ("no", "bf16"):
        with Engine(make_run(tmp_path, mixed_precision=mixed)) as engine:
            assert not engine.scales
            weight = torch.nn.Parameter(torch.ones(1))
            engine.backward((3 * weight).sum())
            assert weight.grad is not None
            assert weight.grad.item() == 3


@pytest.mark.parametrize(("optimizer", "trained"), [("torch-adamw", "float32"), ("adamw_bf16", "bfloat16")])
def test_the_loss_is_scaled_for_a_base_that_computes_in_float16_under_bf16_too(
    tmp_path: Path, optimizer: str, trained: str
) -> None:
    """`base_model_default_dtype` says so of a quantised base; in what it passes back, small gradients would be lost."""
    run = make_run(tmp_path, mixed_precision="bf16", optimizer=optimizer, trained=trained)
    run = replace(run, dtypes=replace(run.dtypes, base="float16"))
    weights, scales, _ = steps_of(run, Overflowing(2), 3)
    assert scales == [65536, 32768, 32768]
    assert equal(weights[0], weights[1])
    assert not equal(weights[1], weights[2])


def test_a_resumed_run_goes_on_with_the_scale_of_the_unbroken_one(tmp_path: Path) -> None:
    options = {"mixed_precision": "fp16", "checkpoint_step_interval": 2, "log_step_interval": 1}
    whole, scales, _ = steps_of(make_run(tmp_path / "whole", **options), Overflowing(2), 5)
    steps_of(make_run(tmp_path / "broken", **options), Overflowing(2), 2)
    state = json.loads((tmp_path / "broken" / "checkpoint-2" / "state.json").read_text())
    assert (state["scaler"]["scale"], state["window"]["skipped_in_a_row"]) == (32768, 1)
    resumed, later_scales, _ = steps_of(make_run(tmp_path / "broken", **options), Family(), 5)
    assert later_scales == scales[2:]
    assert all(equal(one, two) for one, two in zip(whole[2:], resumed, strict=True))


def test_a_window_saved_between_two_overflows_counts_both() -> None:
    former, later = Meter(Alone(), may_skip=True), Meter(Alone(), may_skip=True)
    former.add(1, [make_batch(0, 0)], [torch.ones(2)], [TIME], torch.tensor(0.5))
    former.add(2, [make_batch(0, 1)], [torch.ones(2)], [TIME], torch.tensor(math.inf))
    former.read()
    later.restore(json.loads(json.dumps(former.as_json())))
    later.add(3, [make_batch(0, 2)], [torch.ones(2)], [TIME], torch.tensor(math.nan))
    figures = later.figures()
    assert (figures.skipped_steps, figures.grad_norm) == (2, 0.5)


def test_a_run_whose_scale_keeps_collapsing_ends_with_a_mend(tmp_path: Path) -> None:
    run = make_run(tmp_path, mixed_precision="fp16", log_step_interval=100)
    with (
        trainer_of(run, steps=100, family=Overflowing(*range(1, 200))) as trainer,
        pytest.raises(RunError, match=f'last {MOST_SKIPPED} steps(.|\n)*mixed_precision to "bf16"'),
    ):
        trainer.fit()


def test_skipped_steps_with_others_between_them_do_not_end_a_run() -> None:
    meter = Meter(Alone(), may_skip=True)
    for step in range(4 * MOST_SKIPPED):
        meter.add(step, [make_batch(0, 0)], [torch.ones(2)], [TIME], torch.tensor(math.inf if step % 4 else 1.0))
    assert meter.figures().skipped_steps == 3 * MOST_SKIPPED


def test_a_loss_that_is_not_finite_ends_the_run_as_ever() -> None:
    meter = Meter(Alone(), may_skip=True)
    meter.add(1, [make_batch(0, 0)], [torch.tensor([1.0, math.inf])], [TIME], torch.tensor(math.nan))
    with pytest.raises(RunError, match="The loss of step 1 is not finite"):
        meter.read()


class Repeated:
    """The same two pictures in every step."""

    def __init__(self, family: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        latents_BCHW = torch.randn(2, family.latent.channels, 4, 4, generator=draw)
        cond = family.collate([{"prompt_LD": torch.randn(20, 32, generator=draw)} for _ in range(2)], [])
        self.batch = Batch(latents_BCHW, cond, ("a", "b"), False, MicroBatch(0, (128, 128), (0, 1), 0, 0), 0, 2)

    def groups(self, cursor: Cursor) -> Iterator[Any]:
        while True:
            yield Group([self.batch], Cursor())


def losses_of(run: Run) -> dict[int, float]:
    family, told = load_family(run), Told()
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, run)
    with Engine(run) as engine:
        Trainer(run, engine, family, denoiser, tuning, Repeated(family), [], told, steps=6).fit()
    assert all(not event.extra.get("skipped_steps") for event in told.of(Stepped))
    return told.losses


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_sana_in_fp16_follows_the_float32_run(sana_run: Callable[..., Run], tmp_path: Path, model_type: str) -> None:
    options = {
        "model_type": model_type, "output_dir": str(tmp_path), "optimizer": "torch-adamw", "learning_rate": 3e-3,
        "lr_scheduler": "constant", "lr_warmup_steps": 0, "lora_rank": 4, "lora_dropout": 0.0, "log_step_interval": 1,
    }  # fmt: skip
    exact = losses_of(sana_run("sana", dtypes=FLOAT32, mixed_precision="no", **options))
    half = losses_of(sana_run("sana", dtypes=FP16[model_type], mixed_precision="fp16", **options))
    assert exact[6] < 0.98 * exact[1], "it learns"
    assert [half[step] for step in exact] == pytest.approx(list(exact.values()), rel=5e-3)


@pytest.fixture
def sana_run(request: pytest.FixtureRequest) -> Callable[..., Run]:
    """conftest's `make_run`, under a name that the fakes' own leaves free."""
    return request.getfixturevalue("make_run")
