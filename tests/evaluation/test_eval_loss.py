from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import pytest
import torch

from simpletuner.data.samples import Batch, Cursor, MicroBatch
from simpletuner.errors import RunError
from simpletuner.evaluation.eval_loss import BASE, dealt, quantiles, slices
from simpletuner.events import Measured, Notice
from tests.evaluation.eval_fakes import JudgedFamily, Pictures, judge_of
from tests.training.training_fakes import Group, Told, make_run, stir, trainer_of


def fitted(folder: Path, sets: list[Any], *, steps: int = 2, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """A training of so many steps that is judged; what was measured, in order."""
    family = more.pop("family", JudgedFamily())
    run = make_run(folder, **{"eval_steps_interval": 1, "eval_timesteps": 3, "train_batch_size": 2, **(options or {})})
    told = Told()
    with trainer_of(run, steps=steps, jobs=[judge_of(run, sets)], told=told, family=family, **more) as trainer:
        trainer.fit()
    return told.of(Measured), told, trainer


class Recording(JudgedFamily):
    """Notes what the denoiser is asked, and how it stands meanwhile."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def predict(self, denoiser: Any, x_BCHW: Any, t_B: Any, cond: Any) -> Any:
        answer_BCHW = super().predict(denoiser, x_BCHW, t_B, cond)
        if not torch.is_grad_enabled():
            trains = any(module.training for module in denoiser.modules())
            self.asked.append((x_BCHW, t_B, cond["text_BD"], answer_BCHW, trains))
        return answer_BCHW


def test_the_figure_is_the_mean_squared_error_at_the_densitys_quantiles_with_one_noise_a_picture(tmp_path: Path) -> None:
    family, pictures = Recording(), Pictures(count=2)
    [measured] = fitted(tmp_path, [pictures], steps=0, family=family, options={"eval_timesteps": 4})[0]
    times = [1 / (1 + math.exp(-NormalDist().inv_cdf((i + 0.5) / 4))) for i in range(4)]
    trained = family.asked[:4]
    assert [t_B.tolist() for _, t_B, *_ in trained] == [pytest.approx([t, t], rel=1e-6) for t in times]
    assert {text_BD[:, 0].tolist() == [1.0, 2.0] for _, _, text_BD, *_ in trained} == {True}, "the first caption of each"
    x0_BCHW = torch.stack([pictures.get(i) for i in range(2)]).double()
    noises, losses = [], []
    for (x_BCHW, _, _, answer_BCHW, _), t in zip(trained, times, strict=True):
        noises.append((x_BCHW.double() - (1 - t) * x0_BCHW) / t)
        losses.append((answer_BCHW.double() - (noises[-1] - x0_BCHW)).square().mean().item())
    for noise_BCHW in noises:
        torch.testing.assert_close(noise_BCHW, noises[0], atol=1e-5, rtol=0)
    assert not torch.allclose(noises[0][0], noises[0][1])
    assert measured.figures["eval_loss"] == pytest.approx(fmean(losses), rel=1e-5)
    assert measured.curves["eval_loss"] == [pytest.approx(pair, rel=1e-5) for pair in zip(times, losses, strict=True)]


def test_a_familys_weight_counts(tmp_path: Path) -> None:
    class Weighted(JudgedFamily):
        def weight(self, t_B: torch.Tensor) -> torch.Tensor:
            return 3 * t_B

    [plain], [weighted] = (
        fitted(tmp_path / name, [Pictures()], steps=0, family=family)[0]
        for name, family in (("plain", JudgedFamily()), ("weighted", Weighted()))
    )
    expected = [(t, 3 * t * loss) for t, loss in plain.curves["eval_loss"]]
    assert weighted.curves["eval_loss"] == [pytest.approx(pair, rel=1e-6) for pair in expected]


def test_two_evaluations_without_training_between_are_equal_to_the_bit_and_every_dropout_is_off(tmp_path: Path) -> None:
    family, run = Recording(), make_run(tmp_path, eval_steps_interval=1, model_type="full", train_batch_size=2)
    judge, told = judge_of(run, [Pictures()]), Told()
    with trainer_of(run, steps=3, told=told, family=family) as trainer:
        stir(trainer.tuning)
        state = torch.get_rng_state()
        modes = {name: module.training for name, module in trainer.denoiser.named_modules()}
        judge.run(trainer)
        judge.run(trainer)
        assert torch.equal(torch.get_rng_state(), state)
        assert {name: module.training for name, module in trainer.denoiser.named_modules()} == modes
        assert any(modes.values())
    first, second = told.of(Measured)
    assert first == second
    assert not any(trains for *_, trains in family.asked)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_training_does_not_notice_that_it_is_judged(tmp_path: Path, model_type: str) -> None:
    options = {"model_type": model_type, "lora_dropout": 0.3}
    _, plain, trainer = fitted(tmp_path / "plain", [], steps=4, options=options)
    measured, told, judged = fitted(tmp_path / "judged", [Pictures()], steps=4, options=options)
    assert len(measured) == 5
    assert told.losses == plain.losses
    ours, theirs = judged.tuning.weights(), trainer.tuning.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_after_a_resume_the_figures_and_the_bases_are_the_same(tmp_path: Path, model_type: str) -> None:
    options = {"model_type": model_type, "checkpoint_step_interval": 2}
    before = fitted(tmp_path, [Pictures()], steps=2, options=options)[0][-1]
    after, told, _ = fitted(tmp_path, [Pictures()], steps=3, options=options)
    assert told.of(Notice)
    assert (after[0].step, after[0].figures, after[0].curves) == (2, before.figures, before.curves)
    assert after[1].figures["eval_loss_base"] == before.figures["eval_loss_base"] != after[1].figures["eval_loss"]


class Heavier(JudgedFamily):
    def weight(self, t_B: torch.Tensor) -> torch.Tensor:
        return 2 * super().weight(t_B)


@pytest.mark.parametrize(("count", "family"), [(4, JudgedFamily), (5, Heavier)])
def test_full_tuning_without_the_bases_figures_for_this_question_says_so_and_goes_on(
    tmp_path: Path, count: int, family: type[JudgedFamily]
) -> None:
    options = {"model_type": "full", "checkpoint_step_interval": 2}
    fitted(tmp_path, [Pictures()], steps=2, options=options)
    after, told, _ = fitted(tmp_path, [Pictures(count=count)], steps=3, options=options, family=family())
    assert [list(one.figures) for one in after] == [["eval_loss"], ["eval_loss"]]
    assert sum("without the base's" in notice.text for notice in told.of(Notice)) == 1


def test_a_base_that_cannot_be_kept_stops_the_run_with_its_mend(tmp_path: Path) -> None:
    (tmp_path / BASE).mkdir()
    with pytest.raises(RunError, match="make room there"):
        fitted(tmp_path, [Pictures()], options={"model_type": "full"})


def test_the_average_is_judged_too_where_it_is_shown(tmp_path: Path) -> None:
    options = {"use_ema": True, "ema_decay": 0.9}
    last = fitted(tmp_path / "shown", [Pictures()], options=options)[0][-1]
    assert len({last.figures[name] for name in ("eval_loss", "eval_loss_ema", "eval_loss_base")}) == 3
    hidden = fitted(tmp_path / "hidden", [Pictures()], options={**options, "ema_validation": "none"})[0][-1]
    assert hidden.figures.keys() == {"eval_loss", "eval_loss_base"}
    assert hidden.figures["eval_loss"] == last.figures["eval_loss"]


def test_each_of_several_sets_has_its_own_figure_unless_they_are_pooled(tmp_path: Path) -> None:
    sets = [Pictures("cats", 1), Pictures("dogs", 3)]
    apart = fitted(tmp_path / "apart", sets, steps=0)[0][0]
    names = {"eval_loss", "eval_loss/cats", "eval_loss/dogs"}
    assert {name for name in apart.figures if "base" not in name} == names
    assert apart.figures.keys() == apart.curves.keys()
    cats, dogs = apart.figures["eval_loss/cats"], apart.figures["eval_loss/dogs"]
    assert apart.figures["eval_loss"] == pytest.approx((cats + 3 * dogs) / 4)
    pooled = fitted(tmp_path / "pooled", sets, steps=0, options={"eval_dataset_pooling": True})[0][0]
    assert pooled.figures == {name: apart.figures[name] for name in ("eval_loss", "eval_loss_base")}


class Ones:
    """The same two pictures again and again."""

    def groups(self, cursor: Cursor) -> Any:
        while True:
            batch = Batch(
                torch.ones(2, 4, 3, 3), {"text_BD": torch.ones(2, 4)}, ("a", "b"), False,
                MicroBatch(0, (24, 24), (0, 1), cursor.epoch, 0), 0, 2,
            )  # fmt: skip
            cursor = Cursor(cursor.epoch + 1, 0)
            yield Group([batch], cursor)


def test_it_falls_while_an_adapter_overfits_its_own_set_and_rises_for_a_held_out_one(tmp_path: Path) -> None:
    """What is trained on is all ones, what is held out all minus ones, under the same caption."""
    sets = [Pictures("own", 1, fill=1.0), Pictures("other", 1, fill=-1.0)]
    options = {"eval_steps_interval": 10, "eval_timesteps": 8, "lora_target_preset": "attention"}
    measured, _, _ = fitted(tmp_path, sets, steps=30, options=options, stream=Ones())
    own, other = ([one.figures[f"eval_loss/{name}"] for one in measured] for name in ("own", "other"))
    assert own == sorted(own, reverse=True)
    assert other == sorted(other)
    assert own[-1] < 0.9 * own[0]
    assert other[-1] > 1.1 * other[0]
    assert len({one.figures["eval_loss_base/own"] for one in measured}) == 1


def test_a_run_that_ends_at_no_interval_is_judged_at_its_end_and_one_without_sets_never(tmp_path: Path) -> None:
    options = {"eval_steps_interval": 2}
    assert [one.step for one in fitted(tmp_path / "odd", [Pictures()], steps=5, options=options)[0]] == [0, 2, 4, 5]
    assert fitted(tmp_path / "none", [], steps=2, options=options)[0] == []


def test_steps_and_decimals_of_epochs_both_count(tmp_path: Path) -> None:
    options = {"eval_steps_interval": 4, "eval_epoch_interval": 0.5}
    measured = fitted(tmp_path, [Pictures()], steps=8, options=options)[0]
    assert [one.step for one in measured] == [0, 3, 4, 5, 8], "an epoch has five steps"


def test_what_it_costs_is_said_at_the_start(tmp_path: Path) -> None:
    _, told, _ = fitted(tmp_path, [Pictures()], steps=1)
    text = "eval loss on held-out: 5 pictures at 3 times each, 15 samples through the denoiser."
    assert [notice.text for notice in told.of(Notice)].count(text) == 1


def test_a_slice_never_mixes_buckets_nor_takes_more_than_a_batch_nor_a_picture_that_is_left_out() -> None:
    pictures = Pictures(count=7)
    pictures.dead = {0}
    found = slices([pictures], 2)  # type: ignore[list-item]
    assert [(part.bucket_WH, part.ids) for part in found] == [((24, 24), (1, 3)), ((24, 24), (4, 6)), ((40, 24), (2, 5))]


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (7, 2), (1, 4), (3, 4), (8, 4)])
def test_every_slice_is_dealt_and_all_ranks_get_as_many(count: int, ranks: int) -> None:
    hands = [dealt(count, rank, ranks) for rank in range(ranks)]
    assert {number for hand in hands for number in hand} == set(range(count))
    assert {len(hand) for hand in hands} == {math.ceil(count / ranks)}


def test_the_grid_follows_the_density() -> None:
    assert quantiles(lambda u: u, 4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert quantiles(lambda u: u, 4).dtype == torch.float32


def test_what_full_tuning_remembers_of_the_base_is_what_was_told(tmp_path: Path) -> None:
    first = fitted(tmp_path, [Pictures()], steps=1, options={"model_type": "full"})[0][0]
    kept = json.loads((tmp_path / BASE).read_text())
    assert kept["means"] == {"eval_loss_base": first.figures["eval_loss"]}
