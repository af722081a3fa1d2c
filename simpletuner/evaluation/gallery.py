"""The gallery: the same pictures again and again while training, and once from the untouched base, to see what was learned.

Which pictures is `prompts.py`'s; how one is made is the family's. Rank 0 renders while the others wait.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from simpletuner.config.run import Run
from simpletuner.data.live_prompts import LivePrompts
from simpletuner.data.prompts import PromptStore
from simpletuner.data.ranks import together
from simpletuner.data.samples import Prompt
from simpletuner.data.whole import write_whole
from simpletuner.errors import RunError
from simpletuner.events import Painted, Progress
from simpletuner.families.base import Shot
from simpletuner.training.jobs import Due
from simpletuner.training.optimizers import averaged

if TYPE_CHECKING:
    from simpletuner.training.trainer import Trainer

__all__ = ["Gallery", "Weights", "file_name", "is_complete", "is_painted", "standing", "write_png"]

FOLDER = "validation"
Weights = Literal["base", "trained", "ema"]
SHOWN: dict[str, tuple[Weights, ...]] = {"none": ("trained",), "ema_only": ("ema",), "comparison": ("trained", "ema")}
"""Which weights paint the gallery, by `ema_validation`."""
TASKS = {
    "base": "pictures of the base model",
    "trained": "gallery at step {step}",
    "ema": "gallery of the average at step {step}",
}
NAME_BYTES = 100
"""Longest nickname in a file name; file systems allow 255 bytes for the whole."""


class Gallery:
    """Renders the shots at its times, and the base's own pictures of them before the first."""

    def __init__(self, run: Run, shots: tuple[Shot, ...], prompts: PromptStore | LivePrompts) -> None:
        folder = Path(run.checkpointing.output_dir)
        self._folder = folder / FOLDER
        self._base_folder = None if run.validation.disable_benchmark else folder / "benchmark"
        self._on_startup = run.validation.validation_on_startup
        self._shots = shots
        self._prompts = prompts
        self._kinds = kinds(run)
        self._start: int | None = None
        """Step at which this process began."""
        self._painted: int | None = None
        """Step of the newest gallery."""
        steps = run.validation.validation_step_interval
        assert steps is not None, "config/derive.py fills in validation_step_interval"
        self.due = Due(steps=steps, at_start=True, at_end=True, asked="validate", name="gallery" if shots else "")

    def run(self, trainer: Trainer) -> None:
        """Paint what is due. The first call is the one before the first step."""
        if self._shots:
            together(trainer.engine, lambda: self._run(trainer) if trainer.engine.rank == 0 else None)

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
            self._paint(trainer, self._missing(self._base_folder, 0, "base"), 0, "base")

    def _paint_step(self, trainer: Trainer) -> None:
        """The gallery of this step. Where a run was resumed it is there; pictures of later steps may be another run's."""
        step = self._painted = trainer.state.step
        shots_of = self._missing if step == self._start else self._all
        for weights in self._kinds:
            self._paint(trainer, shots_of(self._folder, step, weights), step, weights)

    def _all(self, folder: Path, step: int, weights: Weights) -> dict[Path, Shot]:
        return {folder / file_name(shot, step, weights): shot for shot in self._shots}

    def _missing(self, folder: Path, step: int, weights: Weights) -> dict[Path, Shot]:
        shots = self._all(folder, step, weights).items()
        return {path: shot for path, shot in shots if not is_painted(path, shot, step, weights)}

    def _paint(self, trainer: Trainer, shots: dict[Path, Shot], step: int, weights: Weights) -> None:
        """Sample all latents, then decode them: denoiser and decoder are never needed at once."""
        if not shots:
            return
        task = TASKS[weights].format(step=step)
        device = trainer.engine.device
        # Not every draw in a library takes a generator; training must not see that pictures were made.
        generators = torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else [])
        with generators, torch.no_grad():
            latents = []
            with standing(trainer, weights), trainer.family.sampler(trainer.denoiser, device) as sample:
                for done, shot in enumerate(shots.values()):
                    trainer.tell(Progress(task, done, len(shots), "pictures"))
                    cond, uncond = (self._prompts.get(prompt) for prompt in _prompts(shot))
                    latents.append(sample(shot, cond, uncond, None).cpu())
            with trainer.family.image_decoder(device) as decode:
                for (path, shot), latents_1CHW in zip(shots.items(), latents, strict=True):
                    image = decode(latents_1CHW, *map(self._prompts.get, _prompts(shot)))
                    write_png(image, path, facts(shot, step, weights))
                    trainer.tell(Painted(path, shot.nickname, shot.prompt, step))
        trainer.tell(Progress(task, len(shots), len(shots), "pictures"))


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


def _prompts(shot: Shot) -> tuple[Prompt, Prompt]:
    return Prompt(shot.prompt), Prompt(shot.negative, "uncond")


def kinds(run: Run) -> tuple[Weights, ...]:
    """Which weights paint the gallery."""
    return SHOWN[run.ema.ema_validation] if run.ema.use_ema else ("trained",)


def file_name(shot: Shot, step: int, weights: Weights = "trained") -> str:
    """`step_<step>_<nickname>_<index>_<W>x<H>.png`, safe on every file system; the average's are named `<nickname>_ema`.

    Nicknames that become the same are still told apart by their index.
    """
    nickname = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", shot.nickname)).strip("_")
    nickname = nickname.encode()[:NAME_BYTES].decode(errors="ignore") or "prompt"
    nickname += "_ema" if weights == "ema" else ""
    return f"step_{step}_{nickname}_{shot.index}_{shot.width_px}x{shot.height_px}.png"


def facts(shot: Shot, step: int, weights: Weights = "trained") -> dict[str, str]:
    """What the picture says of itself in its metadata."""
    return {
        "weights": weights,
        "nickname": shot.nickname,
        "prompt": shot.prompt,
        "negative_prompt": shot.negative,
        "seed": str(shot.seed),
        "guidance": str(shot.guidance),
        "inference_steps": str(shot.steps),
        "step": str(step),
        **dict(shot.settings),
    }


def is_complete(run: Run, shots: tuple[Shot, ...], step: int) -> bool:
    """Whether the gallery of `step` has all its pictures."""
    folder = Path(run.checkpointing.output_dir) / FOLDER
    wanted = [(shot, weights) for weights in kinds(run) for shot in shots]
    return all(is_painted(folder / file_name(shot, step, weights), shot, step, weights) for shot, weights in wanted)


def is_painted(path: Path, shot: Shot, step: int, weights: Weights = "trained") -> bool:
    """Whether `path` holds this very picture, by its metadata."""
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            return facts(shot, step, weights) == image.info
    except OSError:  # no picture at all: paint it anew
        return False


def write_png(image: Image.Image, path: Path, texts: dict[str, str]) -> None:
    """Write a PNG with metadata; `path` is either the whole picture or what it was before. Raises RunError."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    try:
        write_whole(path, file.getvalue())
    except OSError as error:
        mend = "make room there and start the same command again: it goes on from the last checkpoint."
        raise RunError(f"{path} could not be written: {error}.", mend=mend) from error
