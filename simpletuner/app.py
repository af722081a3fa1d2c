"""The composition root: a Run becomes a trained model. Read `train` as the program's table of contents."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from simpletuner.config.resolved import resolved
from simpletuner.config.run import Run
from simpletuner.config.webhooks import secrets_of
from simpletuner.data.batches import Batches
from simpletuner.data.index import ImageSet
from simpletuner.data.ledger import write_ledger
from simpletuner.data.masks import fill_masks
from simpletuner.data.ranks import together
from simpletuner.data.whole import write_whole
from simpletuner.errors import RunError
from simpletuner.evaluation.clip_score import verify_judge
from simpletuner.evaluation.eval_loss import Judge
from simpletuner.evaluation.gallery import Gallery, is_complete
from simpletuner.evaluation.page import PAGE
from simpletuner.events import Bus, Event, Notice, Tell
from simpletuner.families import load as load_family
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.lending import FaultReport, lent_image_prompts, lent_latents, lent_prompts
from simpletuner.networks.libraries import import_model_libraries
from simpletuner.preflight import by_use, length_of, open_sets, plan_of, shots_of, steps_per_epoch
from simpletuner.publishing import publish, some_prompt
from simpletuner.reporting.console import Console, duration
from simpletuner.reporting.failure import telling_failures
from simpletuner.reporting.hub import HubUploads
from simpletuner.reporting.metrics import MetricsFile
from simpletuner.reporting.trackers import open_trackers
from simpletuner.reporting.webhooks import webhooks
from simpletuner.training.checkpoints import EMA, RESULTS, Checkpoints, find_checkpoint, has_result, restore
from simpletuner.training.engine import Engine
from simpletuner.training.jobs import Job
from simpletuner.training.staging import locked
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import load_tuned

__all__ = ["train"]


def train(run: Run) -> Path:
    """Train to the end and return the run's folder. Run again, it goes on where it stands."""
    began_s = time.monotonic()
    folder = Path(run.checkpointing.output_dir)
    config = resolved(run)
    early: list[Event] = []
    family = load_family(run)
    family.verify()
    verify_judge(run)
    with (
        Engine(run) as engine,
        locked(folder, engine, early.append),
        reporting(run, engine, config) as (tell, uploads),
    ):
        for event in (*map(Notice, (*run.notices, *engine.notices)), *early):
            tell(event)
        together(engine, lambda: uploads.sign_in() if uploads else None)
        shots = shots_of(run, family, tell)
        sets = open_sets(run, family.latent, engine, tell)
        for images in sets:
            tell(Notice(images.ledger.summary))
        trained, judged = by_use(sets)
        length = length_of(run, plan_of(run, trained), ranks=engine.ranks)
        tell(Notice(f"{length.summary}."))
        for warning in length.warnings:
            tell(Notice(warning, "warning"))
        checkpoint = find_checkpoint(run, tell)
        is_trained = checkpoint is not None and checkpoint.step >= length.steps
        if checkpoint is not None and is_trained and has_result(run) and is_complete(run, shots, checkpoint.step):
            tell(Notice(f"Finished, step {checkpoint.step} of {length.steps}: nothing is left to do in {folder}."))
            # An upload or a card that failed is tried again.
            publish(run, engine, family, trained, shots, config, length, uploads, tell, step=checkpoint.step, is_new=False)
            return folder

        masks = [fill_masks(images, family.latent, ranks=engine, tell=tell) for images in sets]
        import_model_libraries()
        gc.freeze()  # what was imported stays: else the collection after each encoder searches it all, a third of a second
        with (
            lent_prompts(run, family, sets, shots, engine, tell) as prompts,
            lent_latents(sets, family.image_encoder(), engine, tell, dtype=run.dtypes.latents) as latents,
            lent_image_prompts(family, trained, engine, tell) as image_prompts,
        ):
            stream = plan_of(run, trained, tell)  # pictures that proved unreadable are out of it now
            length = length_of(run, stream, ranks=engine.ranks)
            together(engine, lambda: record(run, folder, sets, config) if engine.rank == 0 else None)

            denoiser, tuning = load_tuned(family, run, device=engine.device, tell=tell)
            count = len(trained)
            batches = Batches(
                stream, trained, latents[:count], prompts, family.collate,
                image_prompts=image_prompts, masks=masks[:count], masked=run.objective.masked_loss_probability,
                seed=run.training.seed, dropout=run.training.caption_dropout_probability,
                ranks=engine, accumulation=run.training.gradient_accumulation_steps,
            )  # fmt: skip
            per_epoch = steps_per_epoch(run, stream, ranks=engine.ranks)
            judge = Judge(run, judged, latents[count:], prompts, steps_per_epoch=per_epoch)
            # Saved before it is painted: a gallery that fails must not cost the steps before it, again and again.
            gallery = Gallery(run, shots, prompts, steps_per_epoch=per_epoch)
            jobs: list[Job] = [Checkpoints(run, config), FaultReport(run, sets, latents), judge, gallery]
            trainer = Trainer(run, engine, family, denoiser, tuning, batches, jobs, tell, steps=length.steps)
            if checkpoint is not None:
                restore(checkpoint, trainer, config)
            trainer.fit()
        seconds = time.monotonic() - began_s
        tell(Notice(closing_words(run, family, trained, shots, steps=trainer.state.step, seconds=seconds)))
        publish(run, engine, family, trained, shots, config, length, uploads, tell, step=length.steps, is_new=True)
    return folder


def closing_words(
    run: Run, family: ModelFamily, sets: Sequence[ImageSet], shots: Sequence[Shot], *, steps: int, seconds: float
) -> str:
    """What was done, where it lies, and how to use it."""
    folder = Path(run.checkpointing.output_dir)
    pictures = sum(images.ledger.used for images in sets)
    result = folder / RESULTS[run.model.model_type]
    lines = [f"Done: {pictures:,} pictures, {steps:,} steps, {duration(seconds)}. Weights: {result}"]
    if run.ema.use_ema:
        lines.append(f"Their average (EMA): {folder / EMA / result.name}")
    if shots:
        lines.append(f"Gallery: {folder / PAGE}")
    return "\n".join([*lines, "Use it anywhere:", "", family.usage(result, some_prompt(sets, shots)), ""])


@contextmanager
def reporting(run: Run, engine: Engine, config: Mapping[str, Any]) -> Iterator[tuple[Tell, HubUploads | None]]:
    """The watchers of rank 0, and the uploads among them if there are to be any; the other ranks tell nobody."""
    if engine.rank != 0:
        yield _nobody, None
        return
    metrics = MetricsFile(Path(run.checkpointing.output_dir) / "metrics.jsonl")
    uploads = HubUploads(run.hub) if run.hub.push_to_hub else None
    with (
        closing(metrics),
        Console(run.reporting.log_level) as console,
        open_trackers(run, config, console) as trackers,
        uploads.telling(console) if uploads else nullcontext(),
        webhooks(run, console) as hooks,
        # Trackers come last: at the end they wait for their servers, and others are not to hear of it that much later.
        telling_failures(Bus([console, metrics, *hooks, *filter(None, [uploads]), *trackers]), secrets_of(run)) as tell,
    ):
        yield tell, uploads


def record(run: Run, folder: Path, sets: Sequence[ImageSet], config: Mapping[str, Any]) -> None:
    """Write what the run was asked for, where each value came from, and the account of its pictures. Raises RunError."""
    try:
        write_whole(folder / "config.json", _json(config))
        write_whole(folder / "config_sources.json", _json(run.sources))
        write_ledger(folder / "ledger.json", [images.ledger for images in sets])
    except OSError as error:
        mend = "make room there, or set output_dir to another folder, and start the same command again."
        raise RunError(f"The run's record in {folder} could not be written: {error}.", mend=mend) from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _nobody(event: Event) -> None:
    """Hears everything and says nothing."""
