"""Each tuning of each family on two ranks over gloo: 2 processes are 1 process that accumulates twice.

This file is also the program that each rank runs: `torchrun --nproc_per_node 2 test_two_ranks.py RESULTS FAMILY=FOLDER ...`,
and without torchrun the one process that they are compared with.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from training_fakes import Family, Group, Stream, Told, make_run, stir, trainer_of

from simpletuner.config.run import Run
from simpletuner.data.samples import Batch, Cursor, MicroBatch, Place, Prompt
from simpletuner.errors import SimpletunerError
from simpletuner.events import Measured, Stepped
from simpletuner.families import find
from simpletuner.networks.libraries import import_model_libraries
from simpletuner.training.engine import Engine
from simpletuner.training.jobs import Asked, Due
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import load_tuned
from tests.contracts.painting import model_of, paint_together
from tests.evaluation.eval_fakes import JudgedFamily, Pictures, judge_of

TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1},
    "full": {"model_type": "full"},
    "int4": {"lora_dropout": 0.1, "base_model_precision": "int4-quanto"},
    "lokr": {
        "lora_type": "lycoris",
        "lycoris_config": {"algo": "lokr", "linear_dim": 2, "factor": 4, "dropout": 0.1, "module_dropout": 0.2},
    },
}
STEPS = 3


class FamilyStream:
    """Two pictures of random latents in each micro-batch; every second micro-batch is regularisation."""

    def __init__(self, family: Any, rank: int, ranks: int) -> None:
        self.family, self.rank, self.ranks = family, rank, ranks
        embeds: list[dict[str, torch.Tensor]] = [{}, {}]
        for encoder in family.text_encoders():
            with encoder.lent("cpu") as encode:
                for merged, new in zip(embeds, encode([Prompt("a red square"), Prompt("", "uncond")]), strict=True):
                    merged.update(new)
        edge = family.latent.native_edge_px
        self.cond = family.collate(embeds, [Place((edge, edge), (edge, edge), (0, 0), (edge, edge))] * 2)
        self.shape = (2, family.latent.channels, *family.latent.grid(edge, edge))

    def groups(self, cursor: Cursor) -> Iterator[Group]:
        for step in range(STEPS):
            group = [self.batch(2 * step + turn, turn) for turn in range(2)]
            yield Group(group[self.rank :: self.ranks], Cursor(0, 2 * step + 2))

    def batch(self, index: int, turn: int) -> Batch:
        latents_BCHW = torch.randn(self.shape, generator=torch.Generator().manual_seed(index))
        return Batch(latents_BCHW, self.cond, ("a", "b"), turn == 1, MicroBatch(0, (0, 0), (0, 1), 0, index), 2 * turn, 4)


def run_of(folder: Path, name: str, repository: str, tuning: str) -> Run:
    return make_run(
        folder,
        **model_of(name, repository),
        **TUNINGS[tuning],
        learning_rate=1e-3,
        lr_scheduler="linear",
        lr_warmup_steps=1,
        lr_end=5e-4,
        optimizer_config={"eps": 1e-2},  # else Adam turns the last bit of a gradient near zero into a whole step
    )


def train(engine: Engine, results: Path, name: str, repository: str, tuning_name: str) -> None:
    """Three steps; gradients, weights and losses of this rank are written to `results`."""
    run = run_of(results, name, repository, tuning_name)
    family, told = find()[name](run), Told()
    gradients: dict[str, torch.Tensor] = {}
    rates: list[float] = []
    denoiser, tuning = load_tuned(family, run, device=engine.device, tell=told)
    stream = FamilyStream(family, engine.rank, engine.ranks)
    trainer = Trainer(run, engine, family, denoiser, tuning, stream, [], told, steps=STEPS)
    step = trainer.optimizer.step

    def note_and_step() -> None:
        found = {key: parameter.grad.clone() for key, parameter in tuning.parameters().items() if parameter.grad is not None}
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        gradients.update({f"{trainer.state.step}/{key}": gradient for key, gradient in found.items()})
        step()

    trainer.optimizer.step = note_and_step  # type: ignore[method-assign,assignment]
    trainer.fit()
    stem = f"{name}-{tuning_name}-{engine.rank}of{engine.ranks}"
    save_file(gradients, results / f"{stem}-gradients.safetensors")
    save_file(tuning.weights(), results / f"{stem}-weights.safetensors")
    norms = [event.grad_norm for event in told.of(Stepped)]
    (results / f"{stem}.json").write_text(json.dumps([list(told.losses.values()), norms, rates]))


def talk(engine: Engine, results: Path) -> None:
    """What ranks tell each other."""
    told = engine.gather({"rank": engine.rank, "text": "ü" * (1000 * engine.rank)})
    agreed = engine.agree(Asked(signal.SIGTERM if engine.rank == 1 else 0, save=engine.rank == 1))
    engine.barrier()
    total = engine.total(torch.tensor([1.0, engine.rank]))
    answer = {
        "total": total.tolist(),
        "texts": [[one["rank"], len(one["text"])] for one in told],
        "agreed": [agreed.signal_number, agreed.save, agreed.validate],
    }
    (results / f"talk-{engine.rank}.json").write_text(json.dumps(answer))


class Stop:
    """A signal that only one rank gets."""

    due = Due(steps=2)

    def run(self, trainer: Trainer) -> None:
        if trainer.engine.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Spoiled(Stream):
    """A picture that is no number, on rank 1 only."""

    def groups(self, cursor: Cursor) -> Iterator[Group]:
        for group in super().groups(cursor):
            if self.rank == 1:
                group.batches[0].latents_BCHW[0] = math.nan
            yield group


class Unwritable(Family):
    """A disk that is full for the one rank that writes."""

    def save_adapter(self, *_: Any) -> Path:
        raise OSError(28, "No space left on device")


def fail_together(engine: Engine, results: Path) -> None:
    """What stops one rank; how both ended is written to `results`."""
    cases: dict[str, dict[str, Any]] = {
        "stopped": {"jobs": [Stop()]},
        "spoiled": {"stream": Spoiled(rank=engine.rank, ranks=engine.ranks)},
        "full": {"family": Unwritable()},
    }
    outcome = {}
    for name, case in cases.items():
        with trainer_of(make_run(results / name), steps=4, engine=engine, **case) as trainer:
            try:
                trainer.fit()
            except SimpletunerError as error:
                outcome[name] = [trainer.state.step, error.exit_code, str(error)]
    (results / f"failed-{engine.rank}.json").write_text(json.dumps(outcome))


class Overflowing(Family):
    """On one rank and in its second step alone, the gradient leaves float16's range."""

    def __init__(self, rank: int) -> None:
        self.rank, self.asked = rank, 0

    def predict(self, *inputs: Any) -> torch.Tensor:
        answer_BCHW = super().predict(*inputs)
        self.asked += 1
        if self.rank == 1 and self.asked == 2:
            answer_BCHW.register_hook(lambda gradient: gradient * math.inf)
        return answer_BCHW


def skip_together(engine: Engine, results: Path) -> None:
    """fp16 with one rank's overflow: the scale and a sum of the weights after each step are written to `results`."""
    run, seen = make_run(results / "fp16", mixed_precision="fp16"), []
    with Engine(run) as scaling, trainer_of(run, steps=3, engine=scaling, family=Overflowing(engine.rank)) as trainer:
        trainer.tell = lambda event: (
            seen.append(
                [scaling.scaler_state()["scale"], *(w.double().sum().item() for w in trainer.tuning.weights().values())]
            )
            if isinstance(event, Stepped)
            else None
        )
        trainer.fit()
    (results / f"fp16-{engine.rank}.json").write_text(json.dumps(seen))


def average_together(engine: Engine, results: Path) -> None:
    """An average of bfloat16 weights, saved after every step by one rank; the weights at the end are written to `results`."""
    options = {"optimizer": "adamw_bf16", "trained": "bfloat16", "mixed_precision": "bf16", "use_ema": True}
    run = make_run(results / "ema", checkpoint_step_interval=1, checkpoints_total_limit=1, **options)
    with trainer_of(run, steps=3, engine=engine) as trainer:
        trainer.fit()
        save_file(trainer.tuning.weights(), results / f"ema-{engine.rank}.safetensors")


def judge_together(engine: Engine, results: Path) -> None:
    """The loss of pictures that are held out, before the first step and after two, what every rank was told."""
    told, pictures = Told(), Pictures(count=5)
    run = make_run(results / f"judged-{engine.ranks}", eval_steps_interval=2, eval_timesteps=3, train_batch_size=2)
    jobs, stream = [judge_of(run, [pictures])], Stream(2 // engine.ranks, rank=engine.rank, ranks=engine.ranks)
    with trainer_of(run, steps=2, jobs=jobs, told=told, family=JudgedFamily(), engine=engine, stream=stream) as trainer:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            stir(trainer.tuning)
        trainer.fit()
    answers = [[measured.step, measured.figures, measured.curves] for measured in told.of(Measured)]
    (results / f"judged-{engine.rank}of{engine.ranks}.json").write_text(json.dumps(answers))


def paint_all(engine: Engine, results: Path, families: Sequence[str]) -> None:
    for pair in families:
        paint_together(engine, results, *pair.split("=", 1))


def train_all(engine: Engine, results: Path, families: Sequence[str]) -> None:
    for pair in families:
        for tuning in TUNINGS:
            train(engine, results, *pair.split("=", 1), tuning)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_repo: Callable[[str], Path], tiny_clip: Path) -> Path:
    """What one process and what two wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "clip").symlink_to(tiny_clip)
    families = [f"{name}={tiny_repo(name)}" for name in find()]
    # Without a GPU no flag is needed: two processes must never be two trainings that know nothing of each other.
    flags = {"ACCELERATE_USE_CPU": "1"} if torch.cuda.is_available() else {}
    # Else MKL's last bit depends on where in memory a tensor happens to lie, and so on whether there is a second process.
    flags |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    flags["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        done = subprocess.run(
            [sys.executable, *launcher, __file__, folder, *families],
            env=os.environ | flags,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tensors(results: Path, stem: str) -> dict[str, torch.Tensor]:
    return load_file(results / f"{stem}.safetensors")


CASES = [(name, tuning) for name in find() for tuning in TUNINGS]


@pytest.mark.parametrize(("name", "tuning"), CASES)
def test_both_ranks_hold_the_same_weights(results: Path, name: str, tuning: str) -> None:
    first, second = (tensors(results, f"{name}-{tuning}-{rank}of2-weights") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "tuning"), CASES)
def test_two_processes_have_the_gradients_of_one_that_accumulates_twice(results: Path, name: str, tuning: str) -> None:
    one, two = (tensors(results, f"{name}-{tuning}-0of{ranks}-gradients") for ranks in (1, 2))
    first = {key for key in one if key.startswith("0/")}
    assert first
    assert one.keys() == two.keys()
    largest = max(one[key].abs().max().item() for key in first)
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=largest * (1e-6 if key in first else 1e-4), rtol=1e-4, msg=key)


@pytest.mark.parametrize(("name", "tuning"), CASES)
def test_two_processes_end_with_the_weights_and_losses_of_one(results: Path, name: str, tuning: str) -> None:
    one, two = (tensors(results, f"{name}-{tuning}-0of{ranks}-weights") for ranks in (1, 2))
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-6, rtol=1e-4, msg=key)
    (losses, norms, _), (losses_of_two, norms_of_two, _) = (
        json.loads((results / f"{name}-{tuning}-0of{ranks}.json").read_text()) for ranks in (1, 2)
    )
    assert losses_of_two == pytest.approx(losses, rel=1e-4)
    assert norms_of_two == pytest.approx(norms, rel=1e-3)
    assert len(losses) == STEPS


@pytest.mark.parametrize(("name", "tuning"), CASES)
def test_the_schedule_counts_optimiser_steps_on_every_rank(results: Path, name: str, tuning: str) -> None:
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        rates = json.loads((results / f"{name}-{tuning}-{rank}of{ranks}.json").read_text())[2]
        assert rates == pytest.approx([1e-3, 1e-3, 7.5e-4], rel=1e-12)


def test_ranks_hear_each_other_in_order_and_agree(results: Path) -> None:
    for rank in range(2):
        told = json.loads((results / f"talk-{rank}.json").read_text())
        assert told == {"texts": [[0, 0], [1, 1000]], "agreed": [15, True, False], "total": [2, 1]}


def test_what_stops_one_rank_stops_both_and_the_stopped_run_is_saved(results: Path) -> None:
    for rank in range(2):
        outcome = json.loads((results / f"failed-{rank}.json").read_text())
        assert outcome["stopped"][:2] == [3, 143]
        assert outcome["spoiled"][:2] == [1, 1]
        assert "The loss of step 1 is not finite. It came from: 0-1-a.png" in outcome["spoiled"][2]
        assert outcome["full"][:2] == [4, 1]
        assert "could not be written" in outcome["full"][2]
    assert [path.name for path in (results / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]


def test_one_ranks_overflow_skips_the_step_on_both(results: Path) -> None:
    first, second = (json.loads((results / f"fp16-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [scale for scale, *_ in first] == [65536, 32768, 32768]
    assert first[0][1:] == first[1][1:] != first[2][1:]


def test_one_rank_saves_an_average_of_bfloat16_weights_and_both_go_on(results: Path) -> None:
    first, second = (tensors(results, f"ema-{rank}") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in (results / "ema").glob("checkpoint-*")] == ["checkpoint-3"]
    average = load_file(results / "ema" / "checkpoint-3" / "ema" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}


def test_the_eval_loss_is_the_same_to_the_bit_on_one_process_and_on_two(results: Path) -> None:
    """Three slices, so that one of two ranks judges one of them for nothing."""
    one, first, second = (json.loads((results / f"judged-{name}.json").read_text()) for name in ("0of1", "0of2", "1of2"))
    assert first == second
    assert [step for step, *_ in first] == [step for step, *_ in one] == [0, 2]
    assert first[0] == one[0]
    assert first[0][1]["eval_loss"] != first[0][1]["eval_loss_base"]
    assert first[1][1]["eval_loss"] == pytest.approx(one[1][1]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("name", find())
def test_two_ranks_share_a_gallery_and_its_files_figures_and_page_are_those_of_one(results: Path, name: str) -> None:
    one, first, second = (json.loads((results / f"painted-{name}-{of}.json").read_text()) for of in ("0of1", "0of2", "1of2"))
    assert (first["own"], second["own"]) == (["cat", "green square"] * 2, ["dog"] * 2)
    assert first["painted"] == second["painted"] == one["painted"]
    assert first["measured"] == second["measured"] == one["measured"]
    assert len(one["measured"]) == 2
    files = [_contents(results / f"painted-by-{ranks}" / name) for ranks in (1, 2)]
    assert files[1] == files[0]
    assert sorted(files[0]) == sorted([*one["painted"], "gallery.html"])
    assert len(one["painted"]) == len(set(files[0].values())) - 1 == 6, "the adapter and its average paint differently"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_model_libraries()
    gc.freeze()  # as conftest.py does it: every loan ends in a collection, which would search all that was imported
    folder = Path(sys.argv[1])
    with Engine(make_run(folder)) as engine:
        train_all(engine, folder, sys.argv[2:])
        judge_together(engine, folder)
        paint_all(engine, folder, sys.argv[2:])
        if engine.ranks > 1:
            talk(engine, folder)
            fail_together(engine, folder)
            average_together(engine, folder)
            skip_together(engine, folder)  # last: its own engine ends the process group
