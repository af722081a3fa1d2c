"""The loss on pictures that are never trained on: the same question each time, so that answers differ by what was learned.

Every picture is judged at every time of a fixed grid, with noise of its own that is always the same, dropouts off.
Shape letters:  B batch,  C latent channels,  H W latent rows and columns,  N times.  Time t is 0 for clean and 1 for noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.config.run import Run
from simpletuner.data.batches import Latents, Prompts
from simpletuner.data.index import ImageSet
from simpletuner.data.ranks import together
from simpletuner.data.samples import Prompt, draw_seed
from simpletuner.data.whole import write_whole
from simpletuner.diffusion.density import Density
from simpletuner.diffusion.objective import l2
from simpletuner.errors import RunError
from simpletuner.evaluation.gallery import standing
from simpletuner.events import Measured, Notice, Progress, Weights
from simpletuner.training.jobs import Due, interval_steps

if TYPE_CHECKING:
    from simpletuner.training.trainer import Trainer

__all__ = ["Figures", "Judge", "Slice", "dealt", "quantiles", "slices"]

NAMES: dict[Weights, str] = {"trained": "eval_loss", "ema": "eval_loss_ema", "base": "eval_loss_base"}
"""What the figures and curves of each state of the weights are called; `<name>/<set>` of one set among several."""
BASE = "eval_base.json"
"""Where full tuning keeps the base's figures, which nobody can ask for after its first step."""


@dataclass(frozen=True)
class Point:
    """One picture at one time."""

    dataset: int
    nth: int
    """Of the times."""
    t: float
    loss: float


@dataclass(frozen=True)
class Slice:
    """Pictures of one set and one bucket that are judged at once."""

    dataset: int
    bucket_WH: tuple[int, int]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Figures:
    """What was measured of one state of the weights, by name."""

    means: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Time -> mean loss there."""

    def __or__(self, other: Figures) -> Figures:
        return Figures(self.means | other.means, self.curves | other.curves)


class Judge:
    """The job that measures the loss: at the start, at its intervals, and at the end. Training does not notice it.

    The loss is the mean squared error of what the family's denoiser answers to its target, times the family's fixed weight at
    that time: what `loss_type: l2` trains on. Robust losses, learned weights, masks and perturbed inputs are left out: they
    shape how a run learns, and figures of runs that differ in them, or of the first and the last step of one whose weights
    are learned, could not be compared.
    """

    def __init__(
        self,
        run: Run,
        sets: Sequence[ImageSet],
        latents: Sequence[Latents],
        prompts: Prompts,
        *,
        steps_per_epoch: Fraction,
    ) -> None:
        options = run.eval_loss
        assert options.eval_steps_interval is not None, "config/derive.py fills in eval_steps_interval"
        assert len(sets) == len(latents), "one store for each set"
        self.due = Due()
        if sets:
            by_epochs = interval_steps(options.eval_epoch_interval, steps_per_epoch)
            self.due = Due(options.eval_steps_interval, by_epochs, at_start=True, at_end=True, name="eval loss")
        self._times = options.eval_timesteps
        self._pooled = options.eval_dataset_pooling or len(sets) == 1
        self._shows_ema = run.ema.use_ema and run.ema.ema_validation != "none"
        self._base_file = Path(run.checkpointing.output_dir) / BASE
        self._sets = sets
        self._latents = latents
        self._prompts = prompts
        self._slices = slices(sets, run.training.train_batch_size)
        self._base: Figures | None = None
        self._has_begun = False

    def run(self, trainer: Trainer) -> None:
        """Measure and tell. The first call is the one before the first step."""
        step = trainer.state.step
        if not self._has_begun:
            self._has_begun = True
            self._announce(trainer)
            # Due after a resume: the run that saved this step may have been stopped before it was judged.
            if step > 0 and not trainer.is_done and not self.due.falls_on(step):
                return
        figures = trained = self._measure(trainer, "trained")
        if self._shows_ema:
            figures |= self._measure(trainer, "ema")
        if self._base is None:
            self._base = self._base_of(trainer, trained)
        trainer.tell(Measured("eval", step, (figures | self._base).means, (figures | self._base).curves))

    def _announce(self, trainer: Trainer) -> None:
        pictures, sets = sum(len(part.ids) for part in self._slices), ", ".join(images.entry.id for images in self._sets)
        text = f"eval loss on {sets}: {pictures:,} {'picture' if pictures == 1 else 'pictures'} at {self._times} times each"
        trainer.tell(Notice(f"{text}, {pictures * self._times:,} samples through the denoiser."))

    def _base_of(self, trainer: Trainer, trained: Figures) -> Figures:
        """The untouched base's figures, under its names. Full tuning has it at step 0 only, and remembers them."""
        if trainer.tuning.keeps_base:
            return self._measure(trainer, "base")
        fingerprint = self._fingerprint(trainer)
        if trainer.state.step == 0:
            base = _renamed(trained)
            together(trainer.engine, lambda: self._remember(base, fingerprint) if trainer.engine.rank == 0 else None)
            return base
        return self._remembered(trainer, fingerprint)

    def _remember(self, base: Figures, fingerprint: str) -> None:
        document = {"version": 1, "fingerprint": fingerprint, **asdict(base)}
        try:
            write_whole(self._base_file, (json.dumps(document) + "\n").encode())
        except OSError as error:
            mend = "make room there and start the same command again."
            raise RunError(f"{self._base_file} could not be written: {error}.", mend=mend) from error

    def _remembered(self, trainer: Trainer, fingerprint: str) -> Figures:
        """What `_remember` wrote, if it was asked the same question."""
        try:
            known = json.loads(self._base_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if known.get("fingerprint") != fingerprint:
            why = "full tuning has changed it, and its figures for these pictures and times were not kept at step 0."
            trainer.tell(Notice(f"The eval loss is told without the base's beside it: {why}"))
            return Figures()
        curves = {name: [(t, loss) for t, loss in curve] for name, curve in known["curves"].items()}
        return Figures(known["means"], curves)

    def _fingerprint(self, trainer: Trainer) -> str:
        """Of what is asked: pictures, captions, sizes, times, how noise is mixed in and how much a time counts."""
        words: list[Any] = [self._pooled, repr(trainer.family.process)]
        for part in self._slices:
            images = self._sets[part.dataset]
            words += [[images.entry.id, images.file(i), images.captions(i)[0], part.bucket_WH] for i in part.ids]
            grid = self._grid(trainer, part)
            words += [grid, trainer.family.weight(torch.tensor(grid)).tolist()]
        return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()

    def _grid(self, trainer: Trainer, part: Slice) -> list[float]:
        """The times of a bucket: the shift, and so the density, may depend on its size."""
        density = trainer.family.density(trainer.family.latent.grid(*part.bucket_WH))
        return quantiles(density, self._times).tolist()

    def _measure(self, trainer: Trainer, weights: Weights) -> Figures:
        """The figures of the model as it stands or stood. Collective; the same numbers on every rank and any number of them."""
        engine, task = trainer.engine, f"{NAMES[weights]} at step {trainer.state.step}"
        own = dealt(len(self._slices), engine.rank, engine.ranks)

        def work() -> list[tuple[int, list[list[float]]]]:
            answers = []
            with torch.no_grad(), standing(trainer, weights):
                for done, number in enumerate(own):
                    trainer.tell(Progress(task, done, len(own), "batches"))
                    answers.append((number, self._judge(trainer, self._slices[number]).tolist()))
            trainer.tell(Progress(task, len(own), len(own), "batches"))
            return answers

        told: dict[int, list[list[float]]] = {}
        for answers in together(engine, work):
            for number, losses_NB in answers:
                told.setdefault(number, losses_NB)
        points = [
            Point(part.dataset, nth, t, loss)
            for number, part in enumerate(self._slices)
            for nth, t in enumerate(self._grid(trainer, part))
            for loss in told[number][nth]
        ]
        return self._summary(NAMES[weights], points)

    def _judge(self, trainer: Trainer, part: Slice) -> Tensor:
        """(N, B) float32."""
        engine, family, images = trainer.engine, trainer.family, self._sets[part.dataset]
        fetched = self._latents[part.dataset].fetch(part.ids)  # of a live set, perhaps what stands in for an unreadable picture
        latents, ids = [each.float() for each in fetched.latents.finish()], fetched.samples
        noises = [_noise(latents_CHW, images, i) for latents_CHW, i in zip(latents, ids, strict=True)]
        x0_BCHW, noise_BCHW = (engine.to_device(torch.stack(parts)) for parts in (latents, noises))
        embeds = self._prompts.fetch([Prompt(images.captions(i)[0]) for i in ids]).finish()
        cond = family.collate(embeds, [images.place(i) for i in ids])
        cond = {name: engine.to_device(tensor) for name, tensor in cond.items()}
        losses = []
        for t in self._grid(trainer, part):
            t_B = engine.to_device(torch.full((len(part.ids),), t))
            answer_BCHW = trainer.predict(family.process.diffuse(x0_BCHW, noise_BCHW, t_B), t_B, cond)
            losses.append(family.weight(t_B) * l2(answer_BCHW, family.process.target(x0_BCHW, noise_BCHW, t_B)))
        return torch.stack(losses)

    def _summary(self, name: str, points: Sequence[Point]) -> Figures:
        figures = _figures(name, points)
        if not self._pooled:
            for dataset, images in enumerate(self._sets):
                figures |= _figures(f"{name}/{images.entry.id}", [point for point in points if point.dataset == dataset])
        return figures


def slices(sets: Sequence[ImageSet], batch_size: int) -> list[Slice]:
    """What is judged, in pieces that no number of ranks alters: a batch of another size may differ in its last bit."""
    found = []
    for dataset, images in enumerate(sets):
        by_bucket: dict[int, list[int]] = {}
        for sample in images.alive().tolist():
            by_bucket.setdefault(int(images.bucket_ids[sample]), []).append(sample)
        for bucket, ids in sorted(by_bucket.items()):
            size = images.entry.train_batch_size or batch_size
            starts = range(0, len(ids), size)
            found += [Slice(dataset, images.buckets[bucket], tuple(ids[start : start + size])) for start in starts]
    return found


def dealt(count: int, rank: int, ranks: int) -> list[int]:
    """The slices of one rank: every `ranks`-th, and then some again, for all ranks must call the denoiser equally often."""
    return [(rank + turn * ranks) % count for turn in range(-(-count // ranks))]


def quantiles(density: Density, count: int) -> Tensor:
    """The times (N,) float32 that cut a density into parts of equal weight, each at its middle: at u = (i + 1/2) / N."""
    return density((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


def _noise(latents_CHW: Tensor, images: ImageSet, sample: int) -> Tensor:
    """A picture's own noise, of a generator of its own: no draw of training's is touched."""
    generator = torch.Generator().manual_seed(draw_seed(images.entry.id, images.file(sample), "eval noise"))
    return torch.randn(latents_CHW.shape, generator=generator)


def _figures(name: str, points: Sequence[Point]) -> Figures:
    """The mean over pictures and times, and over pictures at each time."""
    by_time: dict[int, list[Point]] = {}
    for point in points:
        by_time.setdefault(point.nth, []).append(point)
    curve = [
        (_mean([point.t for point in by_time[nth]]), _mean([point.loss for point in by_time[nth]])) for nth in sorted(by_time)
    ]
    return Figures({name: _mean([point.loss for point in points])}, {name: curve})


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)  # exact, so the order of ranks does not show


def _renamed(trained: Figures) -> Figures:
    """The trained model's figures under the base's names."""

    def named(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        return ((NAMES["base"] + name.removeprefix(NAMES["trained"]), value) for name, value in figures.items())

    return Figures(dict(named(trained.means)), dict(named(trained.curves)))
