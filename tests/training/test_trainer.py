from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_fakes import Family, Group, Stream, Told, Trainer, make_batch, make_run, trainer_of

from simpletuner.data.samples import Cursor, draw_seed
from simpletuner.diffusion.weighting import AdaptiveWeights
from simpletuner.errors import Interrupted, RunError
from simpletuner.events import Notice, RunFinished, RunStarted, Stepped
from simpletuner.training.headroom import Headroom
from simpletuner.training.jobs import Due


class Doing:
    """A job that calls a function."""

    def __init__(self, due: Due, work: Any) -> None:
        self.due = due
        self.work = work

    def run(self, trainer: Trainer) -> None:
        self.work(trainer)


class Short(Stream):
    """Ends after two steps."""

    def groups(self, cursor: Cursor) -> Iterator[Group]:
        yield from islice(super().groups(cursor), 2)


def test_a_stream_that_ends_too_early_is_told_and_not_taken_for_the_end_of_the_run(tmp_path: Path) -> None:
    with (
        trainer_of(make_run(tmp_path), steps=5, stream=Short()) as trainer,
        pytest.raises(RunError, match="After step 2 of 5 no dataset has anything left"),
    ):
        trainer.fit()
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone() for name, parameter in trainer.tuning.parameters().items() if parameter.grad is not None
    }


def test_the_loss_is_the_mean_squared_velocity_error_at_drawn_times(tmp_path: Path) -> None:
    """Against the formula of the paper, in float64, with the same draws."""
    batch = make_batch(1, 3, slot=2, slots=6)
    with trainer_of(make_run(tmp_path, model_type="full"), steps=1) as trainer, trainer.tuning.evaluating():
        loss_B = trainer.loss(batch)
        torch.manual_seed(draw_seed(7, 1, 3))
        u_B = (torch.tensor([2.0, 3.0], dtype=torch.float64) + torch.rand(2, dtype=torch.float64)) / 6
        t_B = torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u_B - 1))
        noise_BCHW = torch.randn(2, 4, 3, 3).double()
        x0_BCHW, t_B111 = batch.latents_BCHW.double(), t_B.view(2, 1, 1, 1)
        x_BCHW = (1 - t_B111) * x0_BCHW + t_B111 * noise_BCHW
        answer_BCHW = trainer.denoiser(x_BCHW.float(), t_B.float(), batch.cond["text_BD"]).double()
    expected_B = ((answer_BCHW - (noise_BCHW - x0_BCHW)) ** 2).mean(dim=(1, 2, 3))
    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B.double(), expected_B, atol=1e-6, rtol=1e-6)


class Weighing(Family):
    """Late times count twice; or, with `adaptive`, as their bucket has learned."""

    adaptive = False

    def weight(self, t_B: Tensor) -> Tensor:
        return 1 + (t_B > 0.5).float()

    def adaptive_weights(self, device: str) -> Any:
        return AdaptiveWeights(torch.logit, device) if self.adaptive else None


class Adapting(Weighing):
    adaptive = True


def test_a_familys_weight_multiplies_each_samples_loss(tmp_path: Path) -> None:
    losses = []
    for family in (Family(), Weighing()):
        run = make_run(tmp_path / str(len(losses)), model_type="full")
        with trainer_of(run, steps=1, family=family) as trainer, trainer.tuning.evaluating():
            losses.append(trainer.loss(make_batch(0, 0, slots=2)))
    plain_B, weighed_B = losses  # strata of a logit-normal: the second sample's time is the later one
    torch.testing.assert_close(weighed_B, plain_B * torch.tensor([1.0, 2.0]))


def test_a_sample_learns_from_what_its_mask_shows(tmp_path: Path) -> None:
    """A row of cells and the two others make the whole picture."""
    batch, row_B1HW = make_batch(0, 0, slots=2), torch.zeros(2, 1, 3, 3)
    row_B1HW[:, :, 1] = 0.5
    with trainer_of(make_run(tmp_path, model_type="full"), steps=1) as trainer, trainer.tuning.evaluating():
        masks_B1HW = (None, row_B1HW, 0.5 - row_B1HW)
        whole_B, row_B, others_B = (trainer.loss(replace(batch, mask_B1HW=mask_B1HW)) for mask_B1HW in masks_B1HW)
    assert not torch.allclose(row_B, whole_B)
    torch.testing.assert_close((row_B + 2 * others_B) / 3, whole_B)


def test_of_an_empty_mask_neither_weights_nor_adaptive_weights_learn(tmp_path: Path) -> None:
    batch = replace(make_batch(0, 0, slots=2), mask_B1HW=torch.zeros(2, 1, 3, 3))
    with trainer_of(make_run(tmp_path, model_type="full"), steps=1, family=Adapting()) as trainer:
        assert trainer.adaptive is not None
        trainer.loss(batch).sum().backward()
        trainer.adaptive.update(lambda tensor: tensor)
        assert set(trainer.adaptive.as_json()) == {1.0}
        assert all(not gradient.any() for gradient in gradients(trainer).values())


def test_adaptive_weights_learn_once_a_step_from_unweighted_losses_that_are_no_regularisation(tmp_path: Path) -> None:
    run = make_run(tmp_path, gradient_accumulation_steps=2)
    with trainer_of(run, steps=3, stream=Stream(2, regularisation=(1, 3, 5)), family=Adapting()) as trainer:
        trainer.fit()
        assert trainer.adaptive is not None
        means = torch.tensor(trainer.adaptive.as_json())
    assert 1 <= (means != 1).sum() <= 6, "one bucket for each of six samples"


def test_adaptive_weights_are_saved_and_go_on(tmp_path: Path) -> None:
    means = {}
    for name, stops in {"whole": (6,), "broken": (3, 6)}.items():
        for steps in stops:
            with trainer_of(make_run(tmp_path / name), steps=steps, family=Adapting()) as trainer:
                trainer.fit()
                assert trainer.adaptive is not None
                means[name] = trainer.adaptive.as_json()
    assert means["whole"] == means["broken"]
    assert len(set(means["whole"])) > 3


def test_the_draws_of_a_micro_batch_do_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path, model_type="full"), steps=1) as trainer:
        first = trainer.loss(make_batch(0, 1))
        torch.rand(17)
        other = trainer.loss(make_batch(0, 2))
        assert torch.equal(trainer.loss(make_batch(0, 1)), first)
        assert not torch.equal(first, other)


def test_one_optimiser_step_covers_the_whole_range_of_times(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Recording(Family):
        def density(self, latent_HW: tuple[int, int]) -> Any:
            return lambda u_B: drawn.extend(u_B.tolist()) or u_B

    with trainer_of(make_run(tmp_path, gradient_accumulation_steps=4), steps=1, family=Recording()) as trainer:
        trainer.fit()
    assert sorted(int(8 * u) for u in drawn) == list(range(8))


def test_an_adapters_regularisation_holds_it_to_the_base(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path, lora_dropout=0.5), steps=1) as trainer:
        batch = make_batch(0, 0, is_regularisation=True)
        assert trainer.loss(batch).tolist() == [0.0, 0.0], "a fresh adapter answers as the base does"
        with torch.no_grad():
            trainer.tuning.parameters()["to_out.0.lora_B.weight"].fill_(0.1)
        loss_B = trainer.loss(batch)
        assert (loss_B > 0).all()
        loss_B.sum().backward()
        assert gradients(trainer)["to_out.0.lora_B.weight"].any()


def test_regularisation_of_full_tuning_is_ordinary_training(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path, model_type="full"), steps=1) as trainer:
        assert torch.equal(trainer.loss(make_batch(0, 0, is_regularisation=True)), trainer.loss(make_batch(0, 0)))


def test_regularisation_is_logged_apart(tmp_path: Path) -> None:
    told = Told()
    with trainer_of(
        make_run(tmp_path, gradient_accumulation_steps=2), steps=1, stream=Stream(2, regularisation=(1,)), told=told
    ) as trainer:
        trainer.fit()
    [event] = told.of(Stepped)
    assert event.extra["regularisation_loss"] == 0
    assert event.loss > 1


def test_accumulation_averages_the_micro_batches(tmp_path: Path) -> None:
    """The gradient that the optimiser sees is the mean over all four samples."""
    seen: list[dict[str, Tensor]] = []
    with trainer_of(make_run(tmp_path, model_type="full", gradient_accumulation_steps=2, max_grad_norm=0), steps=1) as trainer:
        trainer.optimizer.step = lambda: seen.append(gradients(trainer))  # type: ignore[method-assign,assignment]
        trainer.fit()
        group = next(Stream(2).groups(Cursor()))
        torch.cat([trainer.loss(batch) for batch in group.batches]).mean().backward()
        for name, gradient in gradients(trainer).items():
            torch.testing.assert_close(seen[0][name], gradient, atol=1e-7, rtol=1e-6)


def test_weights_learn(tmp_path: Path) -> None:
    class Same(Stream):
        def groups(self, cursor: Cursor) -> Iterator[Group]:
            while True:
                yield Group([make_batch(0, 0)], cursor)

    told = Told()
    with trainer_of(make_run(tmp_path, learning_rate=0.03), steps=60, stream=Same(), told=told) as trainer:
        trainer.fit()
    assert told.losses[60] < 0.8 * told.losses[1]


@pytest.mark.parametrize(
    "kind",
    [
        {"model_type": "lora"},
        {"model_type": "full"},
        {"optimizer": "adamw_bf16", "trained": "bfloat16"},
        {"loss_type": "huber", "huber_schedule": "exponential", "input_perturbation": 0.1, "input_perturbation_steps": 50},
    ],
)
def test_between_log_points_the_host_never_waits_for_the_device(tmp_path: Path, kind: dict[str, Any]) -> None:
    class Syncs(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    run = make_run(tmp_path, log_step_interval=100, gradient_accumulation_steps=2, **kind)
    counts = []
    with trainer_of(run, steps=100, stream=Stream(2, regularisation=(3, 8))) as trainer, Syncs() as syncs:
        trainer.jobs = (Doing(Due(), lambda _: None),)
        step = trainer._step
        trainer._step = lambda group: (step(group), counts.append(syncs.count))  # type: ignore[method-assign,assignment,func-returns-value]
        trainer.fit()
    assert counts == [0] * 100


def test_log_points_come_at_their_interval_and_at_the_end(tmp_path: Path) -> None:
    told = Told()
    with trainer_of(make_run(tmp_path, log_step_interval=4), steps=10, told=told) as trainer:
        trainer.fit()
    assert list(told.losses) == [4, 8, 10]
    assert (told.of(RunStarted)[0].step, told.of(RunFinished)[0].step) == (0, 10)
    assert all(event.samples_per_s > 0 and event.grad_norm > 0 and event.steps == 10 for event in told.of(Stepped))


def test_the_norm_is_logged_as_it_was_before_clipping(tmp_path: Path) -> None:
    norms = []
    for limit in (0.0, 1e-3):
        told = Told()
        with trainer_of(make_run(tmp_path / str(limit), max_grad_norm=limit), steps=1, told=told) as trainer:
            trainer.fit()
        norms.append(told.of(Stepped)[0].grad_norm)
    assert norms[0] == norms[1] > 1e-3


def test_each_number_of_a_gradient_is_cut_by_itself_if_so_asked(tmp_path: Path) -> None:
    options = {"optimizer": "torch-sgd", "optimizer_config": {"momentum": 0.0}, "learning_rate": 1.0, "max_grad_norm": 1e-3}
    moved = {}
    for method in ("norm", "value"):
        with trainer_of(make_run(tmp_path / method, grad_clip_method=method, **options), steps=1) as trainer:
            before = trainer.tuning.weights()
            trainer.fit()
            after = trainer.tuning.weights()
        moved[method] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert moved["norm"].norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert moved["value"].abs().max().item() == pytest.approx(1e-3, rel=1e-2)
    assert moved["value"].norm() > 2 * moved["norm"].norm()


def spoiled(step: int) -> Stream:
    class Spoiled(Stream):
        def groups(self, cursor: Cursor) -> Iterator[Group]:
            for number, group in enumerate(super().groups(cursor), start=1):
                if number == step:
                    group.batches[0].latents_BCHW[1, 0, 0, 0] = math.nan
                yield group

    return Spoiled()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_file(tmp_path: Path) -> None:
    with trainer_of(make_run(tmp_path, log_step_interval=5), steps=10, stream=spoiled(3)) as trainer:
        with pytest.raises(RunError, match=r"loss of step 3 is not finite.*: 0-2-b\.png\."):
            trainer.fit()
        assert trainer.state.step == 5, "found at the log point, not before"


def test_spoiled_weights_are_never_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path, log_step_interval=100, checkpoint_step_interval=2)
    with trainer_of(run, steps=10, stream=spoiled(3)) as trainer, pytest.raises(RunError):
        trainer.fit()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_saved_and_goes_on_as_if_never_stopped(
    tmp_path: Path, sent: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = {"callback_url": "https://host/s3cr3t"}
    words = ["train", "--config_file", "my config.json", "--webhook_config", json.dumps(hook)]
    monkeypatch.setattr("sys.argv", ["/usr/bin/simpletuner", *words])
    whole, broken = make_run(tmp_path / "whole"), make_run(tmp_path / "broken", webhook_config=hook)
    with trainer_of(whole, steps=6) as trainer:
        trainer.fit()
        expected = trainer.tuning.weights()
    painted: list[int] = []
    stop = Doing(Due(steps=4), lambda _: os.kill(os.getpid(), sent))
    gallery = Doing(Due(steps=5, at_end=True), lambda trainer: painted.append(trainer.state.step))
    told = Told()
    with trainer_of(broken, steps=6, jobs=[stop, gallery], told=told) as trainer, pytest.raises(Interrupted) as stopped:
        trainer.fit()
    assert stopped.value.exit_code == code
    assert "Stopped at step 5 of 6" in str(stopped.value)
    assert "simpletuner train --config_file 'my config.json'" in str(stopped.value)
    assert "s3cr3t" not in str(stopped.value)
    assert painted == [], "who wants to leave waits for saving only"
    assert any("saving step 5" in notice.text for notice in told.of(Notice))
    with trainer_of(broken, steps=6) as trainer:
        assert trainer.state.step == 5
        trainer.fit()
        for name, weight in trainer.tuning.weights().items():
            assert torch.equal(weight, expected[name])


def test_jobs_come_in_order_at_start_interval_and_end(tmp_path: Path) -> None:
    done: list[tuple[str, int]] = []

    def note(name: str, **due: Any) -> Doing:
        return Doing(Due(**due), lambda trainer: done.append((name, trainer.state.step)))

    jobs = [note("often", steps=2), note("seldom", steps=3, at_start=True, at_end=True)]
    with trainer_of(make_run(tmp_path), steps=4, jobs=jobs) as trainer:
        trainer.fit()
    assert done == [("seldom", 0), ("often", 2), ("seldom", 3), ("often", 4), ("seldom", 4)]


def test_a_run_at_its_end_does_the_work_of_the_end_only(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with trainer_of(run, steps=2) as trainer:
        trainer.fit()
    done: list[int] = []
    stream = Stream()
    with trainer_of(run, steps=2, stream=stream, jobs=[Doing(Due(at_end=True), lambda _: done.append(1))]) as trainer:
        trainer.fit()
    assert (done, stream.asked) == ([1], [])


def test_the_stream_is_closed_when_the_run_ends(tmp_path: Path) -> None:
    closed: list[bool] = []

    class Watched(Stream):
        def groups(self, cursor: Cursor) -> Iterator[Group]:
            try:
                yield from super().groups(cursor)
            finally:
                closed.append(True)

    with trainer_of(make_run(tmp_path), steps=2, stream=Watched()) as trainer:
        trainer.fit()
        assert closed == [True]


def test_the_denoiser_alone_is_handed_half_precision_and_the_rest_stays_in_float32(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watching(Family):
        def predict(self, denoiser: Any, x_BCHW: Tensor, t_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
            seen.extend([x_BCHW.dtype, t_B.dtype, torch.nn.functional.linear(x_BCHW, torch.ones(3, 3)).dtype])
            return super().predict(denoiser, x_BCHW, t_B, cond)

    run = make_run(tmp_path, model_type="full", autocast="bfloat16")
    with trainer_of(run, steps=1, family=Watching()) as trainer:
        assert trainer.loss(make_batch(0, 0)).dtype == torch.float32
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("optimizer", ["torch-adamw", "adamw_bf16"])
def test_kept_gradient_memory_trains_the_same(tmp_path: Path, optimizer: str) -> None:
    results = []
    for is_freed in (True, False):
        told = Told()
        run = make_run(tmp_path / str(is_freed), set_grads_to_none=is_freed, optimizer=optimizer)
        with trainer_of(run, steps=4, told=told) as trainer:
            trainer.fit()
            gradients = [parameter.grad for parameter in trainer.tuning.parameters().values()]
            results.append((told.losses, trainer.tuning.weights()))
        assert all(gradient is None if is_freed else not gradient.any() for gradient in gradients)
    (losses, weights), (kept_losses, kept_weights) = results
    assert losses == kept_losses
    assert all(torch.equal(weights[name], kept_weights[name]) for name in weights)


def test_a_log_point_tells_what_comes_next_and_a_tight_card_is_told_before_the_gallery(tmp_path: Path) -> None:
    told = Told()
    gallery = Doing(Due(steps=3, name="gallery"), lambda trainer: trainer.tell(Notice("painting")))
    with trainer_of(make_run(tmp_path, log_step_interval=2), steps=4, jobs=[gallery], told=told) as trainer:
        trainer.headroom = Headroom(SimpleNamespace(peak_memory_gib=lambda: 23.9, memory_gib=lambda: 24.0))
        trainer.fit()
    first, second = told.of(Stepped)
    assert (first.upcoming, second.upcoming) == ({"checkpoint": 2, "gallery": 1}, {})
    assert first.steps_per_s == pytest.approx(first.samples_per_s / 2)
    assert first.extra["peak_memory_share"] == pytest.approx(23.9 / 24)
    warning, *painting = [notice.text for notice in told.of(Notice)]
    assert "23.9 GiB of the card's 24.0" in warning
    assert "painting" in painting


def test_a_log_point_tells_the_loss_of_each_tenth_of_time_that_was_drawn(tmp_path: Path) -> None:
    class Late(Family):
        def density(self, latent_HW: tuple[int, int]) -> Any:
            return lambda u_B: 0.3 + 0.1 * (u_B > 0.5)  # of two samples a step, one in each half of u

    told = Told()
    with trainer_of(make_run(tmp_path), steps=1, told=told, family=Late()) as trainer:
        loss_B = trainer.loss(make_batch(0, 0)).tolist()
        trainer.fit()
    [stepped] = told.of(Stepped)
    by_time = {name: value for name, value in stepped.extra.items() if name.startswith("loss_by_time")}
    assert by_time == {"loss_by_time/0.3-0.4": loss_B[0], "loss_by_time/0.4-0.5": loss_B[1]}
