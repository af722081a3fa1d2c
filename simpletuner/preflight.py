"""What a run will do, found before any work: its pictures, their buckets, and how many steps they make.

`simpletuner check` (`checkup.py`) shows it; training begins with the same lines of code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from simpletuner.config.run import Run
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.masks import Masks, find_masks
from simpletuner.data.plan import PlanSet, Stream
from simpletuner.data.ranks import Ranks, together
from simpletuner.data.samples import LatentSpec
from simpletuner.data.walk import walk
from simpletuner.errors import DataError, UserError
from simpletuner.evaluation.prompts import validation_shots
from simpletuner.events import Notice, Tell
from simpletuner.families.base import ModelFamily, Shot

__all__ = [
    "Bucket",
    "Length",
    "bucket_table",
    "by_use",
    "judged_table",
    "length_of",
    "open_sets",
    "plan_of",
    "shots_of",
    "steps_per_epoch",
]


@dataclass(frozen=True)
class Bucket:
    """One row of the bucket table."""

    width_px: int
    height_px: int
    pictures: int
    batches: int
    """Micro-batches in an epoch; 0 in a set that is judged by."""
    top_ups: int
    """Samples that come once more in each epoch, to fill the last batch."""


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    steps: int
    steps_per_epoch: float
    """On an average, where sets start or end on the way."""
    epochs: float
    warnings: tuple[str, ...] = ()
    """Sets that are not drawn from, and an earlier end than was asked for."""

    @property
    def summary(self) -> str:
        """One line: "2,000 optimiser steps: 12.5 epochs of 160 steps"."""
        epochs = f"{_counted(self.epochs, 'epoch')} of {_counted(self.steps_per_epoch, 'step')}"
        return f"{_counted(self.steps, 'optimiser step')}: {epochs}"


def shots_of(run: Run, family: ModelFamily, tell: Tell) -> tuple[Shot, ...]:
    """The pictures of each gallery, as this family makes them. Raises UserError."""
    latent = family.latent
    shots = validation_shots(
        run,
        defaults=family.shot_defaults(),
        guidance=family.shot_guidance(),
        native_edge_px=latent.native_edge_px,
        alignment_px=latent.alignment_px,
        tell=tell,
    )
    if too_large := _too_large(((shot.width_px, shot.height_px) for shot in shots), latent):
        raise UserError(
            f"`validation_resolution` asks for {too_large}.", _limit(latent), 'set "validation_resolution" to smaller sizes.'
        )
    if run.previews.validation_preview and shots and run.previews.validation_preview_steps > family.sampler_steps(shots[0]):
        told = f"`validation_preview_steps` is {run.previews.validation_preview_steps}, more than the"
        tell(Notice(f"{told} {family.sampler_steps(shots[0])} denoising steps of a picture: no frame is shown.", "warning"))
    settings = dict(family.shot_settings())
    if (shift := run.validation.validation_flow_shift) is not None:
        settings["flow_shift"] = shift
    return tuple(replace(shot, settings=tuple((name, str(value)) for name, value in settings.items())) for shot in shots)


def open_sets(run: Run, latent: LatentSpec, ranks: Ranks, tell: Tell) -> list[ImageSet]:
    """All sets of pictures, those to train on first. Rank 0 searches, the others then read what it found.

    Raises DataError, for all sets at once.
    """
    regularising = [entry.id for entry in run.datasets if entry.is_regularisation_data]
    if regularising and run.model.model_type == "full":
        which = ", ".join(regularising)
        tell(Notice(f"{which}: is_regularisation_data is ordinary training in full tuning; its loss is logged apart."))

    first = ranks.rank == 0

    def opened() -> list[ImageSet]:
        sets, failures = [], []
        for entry in run.picture_sets:
            try:
                images = open_dataset(entry, latent, tell=tell, is_searched=not first)
                if entry.conditioning_data is not None and entry.dataset_type == "image":  # the eval loss knows no masks
                    images.pair(masks_of(run, entry.conditioning_data))
                sets.append(images)
            except DataError as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise DataError(f"{len(failures)} datasets cannot be used:\n\n" + "\n\n".join(map(str, failures)))
        return sets

    sets: list[ImageSet] = []
    together(ranks, lambda: sets.extend(opened() if first else []))
    together(ranks, lambda: sets.extend([] if first else opened()))
    too_large = {images.entry.id: listed for images in sets if (listed := _too_large(_used(images), latent))}
    if too_large:
        raise DataError(
            f"Buckets are too large: {'; '.join(f'{dataset}: {listed}' for dataset, listed in too_large.items())}.",
            _limit(latent),
            "lower `resolution` there, or leave long pictures out with `maximum_aspect_ratio` and `minimum_aspect_ratio`.",
        )
    for images in sets:
        if warning := _long_buckets(images, latent):
            tell(Notice(warning, "warning"))
    return sets


def by_use(sets: Sequence[ImageSet]) -> tuple[list[ImageSet], list[ImageSet]]:
    """The sets to train on, and those to judge by."""
    trained = [images for images in sets if images.entry.dataset_type == "image"]
    return trained, [images for images in sets if images.entry.dataset_type == "eval"]


def masks_of(run: Run, name: str) -> Masks:
    """The masks of the conditioning entry of this id. Raises DataError."""
    return find_masks(next(entry for entry in run.conditioning if entry.id == name))


def _used(images: ImageSet) -> list[tuple[int, int]]:
    """(width, height) of the buckets that usable pictures are in."""
    return [images.buckets[bucket] for bucket in np.unique(images.bucket_ids[images.alive()]).tolist()]


def _too_large(sizes_WH: Iterable[tuple[int, int]], latent: LatentSpec) -> str:
    """The sizes that the denoiser has no places for: "1600x64, 1664x64"; "" if it has."""
    longest_px = math.inf if latent.longest_edge_px is None else latent.longest_edge_px
    return ", ".join(f"{width}x{height}" for width, height in sorted(set(sizes_WH)) if max(width, height) > longest_px)


def _limit(latent: LatentSpec) -> str:
    return f"this model's table of positions ends at {latent.longest_edge_px} px."


def _long_buckets(images: ImageSet, latent: LatentSpec) -> str:
    """What is to be said of buckets beyond the model's longest aspect, or ""."""
    if latent.longest_aspect is None:
        return ""
    long = sorted(size_WH for size_WH in _used(images) if max(size_WH) > latent.longest_aspect * min(size_WH))
    if not long:
        return ""
    listed = ", ".join(f"{width}x{height}" for width, height in long)
    return (
        f"{images.entry.id}: this model paints badly beyond {latent.longest_aspect:g}:1, and there are such buckets: {listed}. "
        "`maximum_aspect_ratio` and `minimum_aspect_ratio` leave pictures out."
    )


def plan_of(run: Run, sets: Sequence[ImageSet], tell: Tell | None = None) -> Stream:
    """The stream of micro-batches over all usable pictures. With `tell`, buckets that must be topped up are named."""
    plans = []
    for images in sets:
        alive = images.alive()
        entry = images.entry
        plans.append(
            PlanSet(
                alive, images.bucket_ids[alive], images.buckets,
                batch_size=entry.train_batch_size or run.training.train_batch_size,
                name=entry.id, repeats=entry.repeats, probability=entry.probability,
                first_epoch=max(entry.start_epoch - 1, 0), end_epoch=entry.end_epoch or math.inf,
                first_step=max(entry.start_step - 1, 0), end_step=entry.end_step or math.inf,
            )
        )  # fmt: skip
        top_ups = plans[-1].top_ups()
        if tell is not None and top_ups:
            which = ", ".join(f"{width}x{height} by {count}" for (width, height), count in top_ups.items())
            tell(Notice(f"{entry.id}: buckets topped up from themselves in each epoch, to whole batches: {which}."))
    return Stream(plans, run.training.seed, is_uniform=run.data.data_backend_sampling == "uniform")


def length_of(run: Run, stream: Stream, *, ranks: int) -> Length:
    """How many optimiser steps the run takes: what the user asked for in steps or epochs, whichever ends earlier.

    Raises DataError where datasets wait for an epoch or a step that cannot come.
    """
    training = run.training
    # In exact decimals, as written: floating point makes 12 steps of 10 epochs of 1.1 steps.
    epochs = Fraction(repr(training.num_train_epochs)) if training.num_train_epochs else None
    step_batches = ranks * training.gradient_accumulation_steps
    way = walk(stream, step_batches, steps=training.max_train_steps or None, epochs=epochs)
    waiting = [stream.sets[place].name for place in way.unvisited]
    names = ", ".join(waiting)
    warnings = [f"{names}: never drawn from, for its start lies beyond the end of the run."] if waiting else []
    if way.is_cut_short and (waiting or not way.steps):
        raise DataError(
            f"After step {way.steps} of the run no dataset is drawn from{f', and {names} waits' if waiting else ''}.",
            "the others have ended by then (end_epoch, end_step), or too little of them is left for a whole step.",
            "let `start_epoch` and `start_step` of one dataset meet the end of another.",
        )
    if way.is_cut_short:
        warnings.append(f"Training ends after step {way.steps}: all datasets have ended (end_epoch, end_step).")
    return Length(way.steps, way.steps / way.epochs, way.epochs, tuple(warnings))


def steps_per_epoch(run: Run, stream: Stream, *, ranks: int) -> Fraction:
    """Optimiser steps in an epoch; no whole number need be."""
    return Fraction(stream.epoch_length, ranks * run.training.gradient_accumulation_steps)


def judged_table(images: ImageSet) -> list[Bucket]:
    """The buckets of a set that is judged by: it has no micro-batches."""
    counts = np.bincount(images.bucket_ids[images.alive()], minlength=len(images.buckets)).tolist()
    return [Bucket(*size_WH, count, 0, 0) for size_WH, count in zip(images.buckets, counts, strict=True) if count]


def bucket_table(plan: PlanSet) -> list[Bucket]:
    """The buckets that hold pictures."""
    pictures = [int((plan.bucket_ids == bucket).sum()) for bucket in range(len(plan.buckets))]
    top_ups = plan.top_ups()
    rows = zip(plan.buckets, pictures, plan.batches.tolist(), strict=True)
    return [Bucket(*size_WH, count, batches, top_ups.get(size_WH, 0)) for size_WH, count, batches in rows if count]


def _counted(number: float, noun: str) -> str:
    """ "1 step", "2.5 steps", "12,000 steps"."""
    figure = f"{number:,.3f}".rstrip("0").rstrip(".")
    return f"{figure} {noun}" if number == 1 else f"{figure} {noun}s"
