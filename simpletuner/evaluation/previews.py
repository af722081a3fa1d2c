"""Frames of a picture in the making: told as they come, and the newest of each picture kept in the run's folder.

A frame is made from the latents as they stand, noise included, by the family's quick decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.config.run import Run
from simpletuner.data.whole import write_whole
from simpletuner.evaluation.files import png_of
from simpletuner.evaluation.names import file_stem
from simpletuner.events import Notice, Previewed, Tell, Weights
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
        self.is_on = run.previews.validation_preview
        self._every = run.previews.validation_preview_steps
        self._folder = Path(run.checkpointing.output_dir) / "previews"

    @contextmanager
    def lent(self, trainer: Trainer, step: int, weights: Weights) -> Iterator[Watch]:
        """The quick decoder is on the device in this block only."""
        if not self.is_on:
            yield lambda shot: None
            return
        failures: list[str] = []
        with trainer.family.preview_decoder(trainer.engine.device) as decode:

            def watch(shot: Shot) -> OnStep:
                frame = Previewed(b"", shot.nickname, shot.prompt, step, 0, trainer.family.sampler_steps(shot), weights)
                return self._frames(shot, frame, decode, trainer.tell, failures)

            yield watch
        if failures:
            trainer.tell(Notice(f"Previews could not be kept in {self._folder}: {failures[0]}.", "warning"))

    def _frames(
        self, shot: Shot, frame: Previewed, decode: Callable[[Tensor], Image], tell: Tell, failures: list[str]
    ) -> OnStep:
        path = self._folder / f"{file_stem(shot)}.png"

        def on_step(done: int, latents_1CHW: Tensor) -> None:
            if done % self._every:
                return
            how_far = {"step": str(frame.step), "inference_step": f"{done}/{frame.inference_steps}", "weights": frame.weights}
            png = png_of(decode(latents_1CHW), {"nickname": shot.nickname, "prompt": shot.prompt, **how_far}, compression=FAST)
            tell(replace(frame, png=png, inference_step=done))
            try:
                write_whole(path, png)
            except OSError as error:  # a frame is no picture: the next one replaces it anyway
                failures.append(str(error))

        return on_step
