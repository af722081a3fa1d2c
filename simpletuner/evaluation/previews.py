"""Frames of a picture in the making: told as they come, and the newest of each picture kept in the run's folder.

A frame is made from the latents as they stand, noise included, by the family's quick decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.config.run import Run
from simpletuner.data.whole import write_whole
from simpletuner.evaluation.files import png_of
from simpletuner.evaluation.names import file_stem
from simpletuner.events import Notice, Previewed, Tell
from simpletuner.families.base import OnStep, Shot

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from simpletuner.training.trainer import Trainer

__all__ = ["Previews", "Watch"]

Watch = Callable[[Shot], OnStep | None]
"""What is to be told of the denoising steps of a picture."""
FAST = 1
"""PNG compression of a frame: the sampler waits for it."""


class Previews:
    """Makes frames while a gallery is sampled, if the run asks for them."""

    def __init__(self, run: Run) -> None:
        self._is_on = run.previews.validation_preview
        self._every = run.previews.validation_preview_steps
        self._folder = Path(run.checkpointing.output_dir) / "previews"

    @contextmanager
    def lent(self, trainer: Trainer, step: int) -> Iterator[Watch]:
        """The quick decoder is on the device in this block only."""
        if not self._is_on:
            yield lambda shot: None
            return
        failures: list[str] = []
        with trainer.family.preview_decoder(trainer.engine.device) as decode:
            yield lambda shot: self._frames(shot, trainer.family.sampler_steps(shot), step, decode, trainer.tell, failures)
        if failures:
            trainer.tell(Notice(f"Previews could not be kept in {self._folder}: {failures[0]}.", "warning"))

    def _frames(
        self, shot: Shot, steps: int, step: int, decode: Callable[[Tensor], Image], tell: Tell, failures: list[str]
    ) -> OnStep:
        path = self._folder / f"{file_stem(shot)}.png"

        def on_step(done: int, latents_1CHW: Tensor) -> None:
            if done % self._every:
                return
            texts = {"nickname": shot.nickname, "prompt": shot.prompt, "step": str(step), "inference_step": f"{done}/{steps}"}
            png = png_of(decode(latents_1CHW), texts, compression=FAST)
            tell(Previewed(png, shot.nickname, shot.prompt, step, inference_step=done, inference_steps=steps))
            try:
                write_whole(path, png)
            except OSError as error:  # a frame is no picture: the next one replaces it anyway
                failures.append(str(error))

        return on_step
