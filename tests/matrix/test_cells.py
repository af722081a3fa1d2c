"""What `config/support.py` says trains does train: steps, checkpoint, resume, over every two of its values that go together.

All cells, not only the few that cover the pairs: `python -m pytest -n 2 tests/matrix --all-cells` (tens of minutes).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Generator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fakes import Group, Told

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.run import Hardware, Run
from simpletuner.config.support import ADAPTERS, BASES, FORMATS, Cell, cells, cover, refusals, run_of
from simpletuner.data.samples import Batch, Cursor, MicroBatch, Place, Prompt
from simpletuner.examples.tiny import model_options
from simpletuner.families import find
from simpletuner.training.checkpoints import Checkpoints, find_checkpoint, restore
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import load_tuned

STEPS = 3
CONFIG: dict[str, Any] = {"data_backend_config": []}
MACHINE = Hardware()


@functools.cache
def supported() -> tuple[Cell, ...]:
    return tuple(cells(find(), MACHINE))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        chosen = supported() if metafunc.config.getoption("--all-cells") else cover(supported())
        metafunc.parametrize("cell", chosen, ids=str)


@functools.cache
def material(name: str, repository: str) -> tuple[torch.Size, dict[str, torch.Tensor]]:
    """The shape of two latents and the conditions beside them: the same for all cells of a family."""
    family = find()[name](run_of(find()[name], name, {"pretrained_model_name_or_path": repository}, MACHINE))
    embeds: list[dict[str, torch.Tensor]] = [{}, {}]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            for merged, new in zip(embeds, encode([Prompt("a red square"), Prompt("", "uncond")]), strict=True):
                merged.update(new)
    edge = family.latent.native_edge_px
    cond = family.collate(embeds, [Place((edge, edge), (edge, edge), (0, 0), (edge, edge))] * 2)
    return torch.Size((2, family.latent.channels, *family.latent.grid(edge, edge))), cond


class Pictures:
    """Two random latents a step, keyed by the step."""

    def __init__(self, name: str, repository: str) -> None:
        self.shape, self.cond = material(name, repository)

    def groups(self, cursor: Cursor) -> Generator[Group, None, None]:
        for step in range(cursor.position, STEPS):
            latents_BCHW = torch.randn(self.shape, generator=torch.Generator().manual_seed(step))
            micro = MicroBatch(0, (0, 0), (0, 1), 0, step)
            yield Group([Batch(latents_BCHW, self.cond, ("a", "b"), False, micro, 0, 2)], Cursor(0, step + 1))


def train(run: Run, repository: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Told]:
    """(trained weights at the start, at the end, what was told)."""
    name, told = run.model.model_family, Told()
    found = find_checkpoint(run, told)
    with Engine(run) as engine:
        family = find()[name](run)
        denoiser, tuning = load_tuned(family, run, device=engine.device, tell=told)
        trainer = Trainer(
            run, engine, family, denoiser, tuning, Pictures(name, repository), [Checkpoints(run, CONFIG)], told, steps=STEPS
        )
        before = tuning.weights()
        if found is not None:
            restore(found, trainer, CONFIG)
        trainer.fit()
        return before, tuning.weights(), told


def test_it_trains_saves_and_goes_on_as_if_unbroken(cell: Cell, tiny_repo: Callable[[str], Path], tmp_path: Path) -> None:
    name, repository = cell.family, model_options(cell.family, tiny_repo(cell.family))["pretrained_model_name_or_path"]
    options = {"pretrained_model_name_or_path": repository, "output_dir": str(tmp_path / "run"), "checkpoint_step_interval": 2}
    options |= {"lora_rank": 2, "lr_scheduler": "constant", "log_step_interval": 1, "gradient_checkpointing": False}
    options |= cell.options
    assert not refusals(find()[name], name, options, MACHINE)
    run = run_of(find()[name], name, options, MACHINE)
    before, after, told = train(run, repository)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[key], before[key]) for key in after), "nothing moved"
    assert all(torch.isfinite(weight).all() for weight in after.values() if weight.is_floating_point())
    assert len(told.losses) == STEPS

    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS}")
    _, again, told_again = train(run, repository)
    assert told_again.losses == {STEPS: told.losses[STEPS]}
    assert all(torch.equal(after[key], again[key]) for key in after), "a resumed run ends elsewhere"


@pytest.mark.parametrize("name", find())
def test_what_is_refused_is_refused_with_reason_and_mend(name: str) -> None:
    refused = 0
    for adapter, base, mixed in product(ADAPTERS, BASES, FORMATS):
        options = {"base_model_precision": base, "mixed_precision": mixed, **ADAPTERS[adapter]}
        for problem in refusals(find()[name], name, options, MACHINE):
            assert problem.why, options
            assert problem.mend, options
            refused += 1
    assert refused >= 21, "full tuning of a base in few bits, in seven formats and three precisions"


def test_the_few_cells_of_every_day_hold_every_pair_that_goes_together() -> None:
    pairs = set().union(*(cell.pairs for cell in supported()))
    assert set().union(*(cell.pairs for cell in cover(supported()))) == pairs
    assert {value for pair in pairs for _, value in pair} >= {*find(), *ADAPTERS, *BASES, *OPTIMIZERS}
