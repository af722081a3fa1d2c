"""The composition root: a Run becomes a trained model. Read `train` as the program's table of contents."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from simpletuner.config.resolved import resolved
from simpletuner.config.run import Run
from simpletuner.data.batches import Batches
from simpletuner.data.index import ImageSet
from simpletuner.data.ledger import write_ledger
from simpletuner.data.precompute import fill_latents
from simpletuner.data.ranks import together
from simpletuner.data.whole import write_whole
from simpletuner.errors import RunError
from simpletuner.evaluation.clip_score import verify_judge
from simpletuner.evaluation.gallery import Gallery, is_complete
from simpletuner.evaluation.page import PAGE
from simpletuner.events import Bus, Event, Notice, Tell
from simpletuner.families import load as load_family
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.networks.libraries import import_model_libraries
from simpletuner.preflight import length_of, open_sets, plan_of, shots_of, steps_per_epoch
from simpletuner.reporting.console import Console, duration
from simpletuner.reporting.metrics import MetricsFile
from simpletuner.text_cache import fill_prompts, open_store, wanted_prompts
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
    with Engine(run) as engine, locked(folder, engine, early.append), reporting(run, engine) as tell:
        for event in (*map(Notice, (*run.notices, *engine.notices)), *early):
            tell(event)
        shots = shots_of(run, family, tell)
        sets = open_sets(run, family.latent, engine, tell)
        for images in sets:
            tell(Notice(images.ledger.summary))
        length = length_of(run, plan_of(run, sets), ranks=engine.ranks)
        tell(Notice(f"{length.summary}."))
        checkpoint = find_checkpoint(run, tell)
        is_trained = checkpoint is not None and checkpoint.step >= length.steps
        if checkpoint is not None and is_trained and has_result(run) and is_complete(run, shots, checkpoint.step):
            tell(Notice(f"Finished, step {checkpoint.step} of {length.steps}: nothing is left to do in {folder}."))
            return folder

        import_model_libraries()
        prompts = open_store(run, family)
        fill_prompts(prompts, family, wanted_prompts(sets, shots), device=engine.device, ranks=engine, tell=tell)
        latents = fill_latents(
            sets, family.image_encoder(), dtype=run.dtypes.latents, device=engine.device, ranks=engine, tell=tell
        )
        stream = plan_of(run, sets, tell)  # pictures that proved unreadable are out of it now
        steps = length_of(run, stream, ranks=engine.ranks).steps
        together(engine, lambda: record(run, folder, sets, config) if engine.rank == 0 else None)

        denoiser, tuning = load_tuned(family, run, device=engine.device, tell=tell)
        batches = Batches(
            stream, sets, latents, prompts, family.collate,
            seed=run.training.seed, dropout=run.training.caption_dropout_probability,
            ranks=engine, accumulation=run.training.gradient_accumulation_steps,
        )  # fmt: skip
        # Saved before it is painted: a gallery that fails must not cost the steps before it, again and again.
        gallery = Gallery(run, shots, prompts, steps_per_epoch=steps_per_epoch(run, stream, ranks=engine.ranks))
        jobs: list[Job] = [Checkpoints(run, config), gallery]
        trainer = Trainer(run, engine, family, denoiser, tuning, batches, jobs, tell, steps=steps)
        if checkpoint is not None:
            restore(checkpoint, trainer, config)
        trainer.fit()
        tell(Notice(closing_words(run, family, sets, shots, steps=trainer.state.step, seconds=time.monotonic() - began_s)))
    return folder


def closing_words(
    run: Run, family: ModelFamily, sets: Sequence[ImageSet], shots: Sequence[Shot], *, steps: int, seconds: float
) -> str:
    """What was done, where it lies, and how to use it."""
    folder = Path(run.checkpointing.output_dir)
    pictures = sum(images.ledger.used for images in sets)
    result = folder / RESULTS[run.model.model_type]
    prompt = shots[0].prompt if shots else sets[0].captions(int(sets[0].alive()[0]))[0]
    lines = [f"Done: {pictures:,} pictures, {steps:,} steps, {duration(seconds)}. Weights: {result}"]
    if run.ema.use_ema:
        lines.append(f"Their average (EMA): {folder / EMA / result.name}")
    if shots:
        lines.append(f"Gallery: {folder / PAGE}")
    return "\n".join([*lines, "Use it anywhere:", "", family.usage(result, prompt), ""])


@contextmanager
def reporting(run: Run, engine: Engine) -> Iterator[Tell]:
    """The watchers of rank 0; the other ranks tell nobody."""
    if engine.rank != 0:
        yield _nobody
        return
    metrics = MetricsFile(Path(run.checkpointing.output_dir) / "metrics.jsonl")
    with closing(metrics), Console(run.reporting.log_level) as console:
        yield Bus([console, metrics])


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
