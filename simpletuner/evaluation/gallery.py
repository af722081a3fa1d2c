"""The gallery: the same pictures again and again while training, and once from the untouched base, to see what was learned.

Which pictures is `prompts.py`'s; how one is made is the family's. Every process paints and scores its share of them, and files,
events, figures and page are those of one process. With previews rank 0 paints them all, as frames are told while they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.config.run import Run
from simpletuner.data.live_prompts import LivePrompts
from simpletuner.data.prompts import PromptStore
from simpletuner.data.ranks import Ranks, together
from simpletuner.data.samples import Prompt
from simpletuner.evaluation.clip_score import ClipScore, figures_of
from simpletuner.evaluation.files import Account, PictureFiles, png_of
from simpletuner.evaluation.names import facts, file_name, is_painted
from simpletuner.evaluation.news import PictureNews
from simpletuner.evaluation.page import write_page
from simpletuner.evaluation.previews import Previews
from simpletuner.events import Measured, Painted, Progress, Weights
from simpletuner.families.base import Shot
from simpletuner.training.jobs import Due, interval_steps
from simpletuner.training.optimizers import averaged

if TYPE_CHECKING:
    from simpletuner.training.trainer import Trainer

__all__ = ["Gallery", "is_complete", "standing"]

FOLDER = "validation"
BASE_FOLDER = "benchmark"
SHOWN: dict[str, tuple[Weights, ...]] = {"none": ("trained",), "ema_only": ("ema",), "comparison": ("trained", "ema")}
"""Which weights paint the gallery, by `ema_validation`."""
TASKS = {
    "base": "pictures of the base model",
    "trained": "gallery at step {step}",
    "ema": "gallery of the average at step {step}",
}


class Gallery:
    """Renders the shots at its times, and the base's own pictures of them before the first."""

    def __init__(
        self, run: Run, shots: tuple[Shot, ...], prompts: PromptStore | LivePrompts, *, steps_per_epoch: Fraction
    ) -> None:
        self._run_folder = Path(run.checkpointing.output_dir)
        self._folder = self._run_folder / FOLDER
        self._base_folder = None if run.validation.disable_benchmark else self._run_folder / BASE_FOLDER
        self._on_startup = run.validation.validation_on_startup
        self._shots = shots
        self._prompts = prompts
        self._kinds = kinds(run)
        self._files = PictureFiles()
        self._news = PictureNews()
        self._previews = Previews(run)
        self._clip = ClipScore(run) if shots and run.scores.evaluation_type == "clip" else None
        self._start: int | None = None
        """Step at which this process began."""
        self._painted: int | None = None
        """Step of the newest gallery."""
        steps = run.validation.validation_step_interval
        assert steps is not None, "config/derive.py fills in validation_step_interval"
        epoch_steps = interval_steps(run.validation.validation_epoch_interval, steps_per_epoch)
        self.due = Due(
            steps=steps, epoch_steps=epoch_steps, at_start=True, at_end=True, asked="validate", name="gallery" if shots else ""
        )

    def run(self, trainer: Trainer) -> None:
        """Paint what is due. The first call is the one before the first step. Collective."""
        if not self._shots:
            return
        self._settle(trainer, self._files.retry)
        self._run(trainer)
        accounts = self._settle(trainer, self._files.give_up if trainer.is_done else _nothing)
        lay_out = partial(write_page, self._run_folder, trainer.tell, galleries=(BASE_FOLDER, FOLDER))
        together(trainer.engine, lay_out if trainer.engine.rank == 0 else _nothing)
        self._news.tell_unwritten(accounts, trainer.tell, is_last=trainer.is_done)

    def _run(self, trainer: Trainer) -> None:
        if self._start is None:
            self._start = trainer.state.step
            self._paint_base(trainer)
            # Due here: the run that saved this step may have been killed before its pictures were painted.
            if not (self._on_startup or trainer.is_done or self.due.falls_on(self._start)):
                return
        if trainer.state.step != self._painted:
            self._paint_step(trainer)

    def _paint_base(self, trainer: Trainer) -> None:
        """The base's own pictures, once. Full tuning changes the base: after its first step nobody can ask it any more."""
        if self._base_folder is not None and (trainer.state.step == 0 or trainer.tuning.keeps_base):
            self._paint(trainer, self._base_folder, 0, "base", only_missing=True)

    def _paint_step(self, trainer: Trainer) -> None:
        """The gallery of this step. Where a run was resumed it is there; pictures of later steps may be another run's."""
        step = self._painted = trainer.state.step
        for weights in self._kinds:
            self._paint(trainer, self._folder, step, weights, only_missing=step == self._start)

    def _paint(self, trainer: Trainer, folder: Path, step: int, weights: Weights, *, only_missing: bool) -> None:
        """Paint, each rank its share, and tell of it in the order of the shots. Collective."""
        engine, task = trainer.engine, TASKS[weights].format(step=step)
        whole = {folder / file_name(shot, step, weights): shot for shot in self._shots}
        shots = _missing(engine, whole, step, weights) if only_missing else whole
        if not shots:
            return
        # Frames are told while a picture is made, and watchers sit on rank 0.
        painters = 1 if self._previews.is_on else engine.ranks
        own = {path: shots[path] for path in _share(list(shots), engine.rank, painters)}
        self._news.expect(Painted(path, shot.nickname, shot.prompt, step, weights) for path, shot in shots.items())

        def come_to(done: int) -> None:
            trainer.tell(Progress(task, done * painters, len(shots), "pictures"))  # the others keep pace, more or less

        self._settle(trainer, lambda: self._paint_own(trainer, own, step, weights, come_to))
        trainer.tell(Progress(task, len(shots), len(shots), "pictures"))
        former = [path for path in whole if path not in shots]
        mine = [*own, *_share(former, engine.rank, engine.ranks)]
        self._measure(trainer, {path: whole[path] for path in mine}, step, weights)

    def _paint_own(
        self, trainer: Trainer, shots: dict[Path, Shot], step: int, weights: Weights, come_to: Callable[[int], None]
    ) -> None:
        """Sample all latents, then decode them: denoiser and decoder are never needed at once.

        Nothing here may wait for other ranks: they have fewer shots, or none. Were the denoiser's weights sharded, each call
        of it would wait; all shares would then have to take equally many, as `eval_loss.dealt` does it.
        """
        if not shots:
            return
        device = trainer.engine.device
        # Not every draw in a library takes a generator; training must not see that pictures were made, nor a picture which
        # ones this rank made before it.
        generators = torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else [])
        with generators, torch.no_grad():
            latents = []
            with (
                self._previews.lent(trainer, step, weights) as watch,
                standing(trainer, weights),
                trainer.family.sampler(trainer.denoiser, device) as sample,
            ):
                for done, shot in enumerate(shots.values()):
                    come_to(done)
                    trainer.engine.seed(shot.seed)
                    cond, uncond = (self._prompts.get(prompt) for prompt in _prompts(shot))
                    with trainer.tuning.at_strength(shot.adapter_strength):
                        latents.append(sample(shot, cond, uncond, watch(shot)).cpu())
            with trainer.family.image_decoder(device) as decode:
                for (path, shot), latents_1CHW in zip(shots.items(), latents, strict=True):
                    trainer.engine.seed(shot.seed)
                    image = decode(latents_1CHW, *map(self._prompts.get, _prompts(shot)))
                    self._files.write(path, png_of(image, facts(shot, step, weights)))

    def _measure(self, trainer: Trainer, shots: dict[Path, Shot], step: int, weights: Weights) -> None:
        """Score all pictures of this gallery, also those that an earlier run painted; `shots` are this rank's part of them.

        Collective. Denoiser and decoder are at rest. A picture that waits for room is known to its painter alone.
        """
        clip = self._clip
        if clip is None:
            return

        def work() -> list[float]:
            there = {path: shot for path, shot in shots.items() if self._files.has(path)}
            pictures = ((self._files.open(path), shot.prompt) for path, shot in there.items())
            return clip.scores(pictures, device=trainer.engine.device) if there else []

        scores = [score for part in together(trainer.engine, work) for score in part]
        if scores:  # else no picture of it found room, which was told
            trainer.tell(Measured("clip", step, figures_of(scores, weights)))

    def _settle(self, trainer: Trainer, work: Callable[[], None]) -> list[Account]:
        """Do this rank's part of some work; then tell which pictures, of all ranks, have their files by now. Collective."""

        def work_and_account() -> dict[str, Any]:
            work()
            return asdict(self._files.account())

        accounts = [Account(**told) for told in together(trainer.engine, work_and_account)]
        self._news.tell_painted(accounts, trainer.tell)
        return accounts


@contextmanager
def standing(trainer: Trainer, weights: Weights) -> Iterator[None]:
    """The model as it is shown, every dropout off: the base, the newest weights, or their average."""
    with ExitStack() as stack:
        stack.enter_context(trainer.engine.attention())
        stack.enter_context(trainer.tuning.disabled() if weights == "base" else trainer.tuning.evaluating())
        if weights == "trained":
            stack.enter_context(averaged(trainer.optimizer, trainer.tuning.parameters()))
        if weights == "ema":
            assert trainer.ema is not None, "`kinds` names the average only where one is kept"
            stack.enter_context(trainer.ema.applied())
        yield


def _missing(ranks: Ranks, shots: dict[Path, Shot], step: int, weights: Weights) -> dict[Path, Shot]:
    """What is not painted yet, as rank 0 finds it, before any rank writes: all must share out the same. Collective."""

    def look() -> list[str]:
        return [path.name for path, shot in shots.items() if not is_painted(path, shot, step, weights)]

    names = together(ranks, look if ranks.rank == 0 else _nothing)[0]
    return {path: shot for path, shot in shots.items() if path.name in names}


def _share(paths: list[Path], rank: int, ranks: int) -> list[Path]:
    """Every `ranks`-th; nothing for a rank beyond them."""
    return paths[rank::ranks] if rank < ranks else []


def _nothing() -> None:
    """What ranks do that have no part in some work."""


def _prompts(shot: Shot) -> tuple[Prompt, Prompt]:
    return Prompt(shot.prompt), Prompt(shot.negative, "uncond")


def kinds(run: Run) -> tuple[Weights, ...]:
    """Which weights paint the gallery."""
    return SHOWN[run.ema.ema_validation] if run.ema.use_ema else ("trained",)


def is_complete(run: Run, shots: tuple[Shot, ...], step: int) -> bool:
    """Whether the gallery of `step` has all its pictures."""
    folder = Path(run.checkpointing.output_dir) / FOLDER
    wanted = [(shot, weights) for weights in kinds(run) for shot in shots]
    return all(is_painted(folder / file_name(shot, step, weights), shot, step, weights) for shot, weights in wanted)
