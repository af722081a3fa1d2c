"""Where a run's embeds and latents come from: caches that are filled before it, or encoders that stay lent round its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from simpletuner.config.run import Run
from simpletuner.data.batches import ImagePrompts, Latents
from simpletuner.data.cache import TensorCache
from simpletuner.data.encoding import latent_recipe
from simpletuner.data.index import ImageSet
from simpletuner.data.keep import Keep, Memory, OnDisk
from simpletuner.data.ledger import write_ledger
from simpletuner.data.live import LiveLatents
from simpletuner.data.live_prompts import LiveEncoder, LivePrompts
from simpletuner.data.precompute import LatentStore, fill_latents
from simpletuner.data.prompts import UNCOND, PromptStore
from simpletuner.data.ranks import together
from simpletuner.data.samples import PictureEncoder, Recipe
from simpletuner.errors import RunError
from simpletuner.evaluation.prompts import prompts_of
from simpletuner.events import Notice, Tell
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.text_cache import fill_prompts, open_store, wanted_prompts
from simpletuner.training.engine import Engine
from simpletuner.training.jobs import Due
from simpletuner.training.trainer import Trainer

__all__ = ["FaultReport", "lent_image_prompts", "lent_latents", "lent_prompts"]

READERS = 16
"""Threads that read and decode pictures."""

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def lent_prompts(
    run: Run, family: ModelFamily, sets: Sequence[ImageSet], shots: Sequence[Shot], engine: Engine, tell: Tell
) -> Iterator[PromptStore | LivePrompts]:
    """The embeds of all prompts. Text encoders stay in memory in the block only where the run has no cache filled before it."""
    options = run.text_embeds
    prompts = wanted_prompts(sets, shots)
    if options.filled == "before":
        cached = open_store(run, family)
        fill_prompts(cached, family, prompts, device=engine.device, ranks=engine, tell=tell)
        yield cached
        return
    with ExitStack() as stack:
        encoders = []
        for encoder in family.text_encoders():
            encode = _exact(stack.enter_context(encoder.lent(engine.device)), engine)
            keep: Keep = Memory()
            if options.text_cache_ondemand:
                assert options.cache_dir is not None, "config/derive.py fills in cache_dir"
                keep = _on_disk(Path(options.cache_dir), encoder.recipe, options.write_batch_size, engine, tell, stack)
            encoders.append(LiveEncoder(encode, keep))
        store = LivePrompts(prompts, encoders, text_encoder_batch_size=options.text_encoder_batch_size)
        names = ", ".join(encoder.recipe.name for encoder in family.text_encoders())
        tell(Notice(_staying("captions", names, is_cached=options.text_cache_ondemand)))
        if options.text_cache_disable and options.text_encoder_batch_size > 1:
            tell(Notice(_in_batches("text_encoder_batch_size", options.text_encoder_batch_size, "captions")))
        store.hold([UNCOND, *prompts_of(shots)])
        yield store


@contextmanager
def lent_latents(
    sets: Sequence[ImageSet], encoder: PictureEncoder, engine: Engine, tell: Tell, *, dtype: str, part: str = ""
) -> Iterator[list[Latents]]:
    """What an encoder makes of the pictures of each set: latents, or the `part` of that name besides them.

    The encoder stays in memory in the block only where there is a set whose cache is not filled before.
    """
    cached = [images for images in sets if images.entry.filled == "before"]
    filled: list[LatentStore] = []
    if cached:
        filled = fill_latents(cached, encoder, dtype=dtype, device=engine.device, ranks=engine, tell=tell, part=part)
    if len(cached) == len(sets):
        yield list(filled)
        return
    with ExitStack() as stack:
        encode = _exact(stack.enter_context(encoder.lent(engine.device)), engine)
        pool = stack.enter_context(ThreadPoolExecutor(READERS, thread_name_prefix="read-pictures"))
        memory, recipe, rest = Memory(), latent_recipe(encoder, dtype), iter(filled)
        stores: list[Latents] = []
        for images in sets:
            if images.entry.filled == "before":
                stores.append(next(rest))
                continue
            entry = images.entry
            keep: Keep = memory
            tell(Notice(f"{entry.id}: {_staying('pictures', encoder.recipe.name, is_cached=entry.vae_cache_ondemand)}"))
            if entry.vae_cache_ondemand:
                keep = _on_disk(images.cache_dir, recipe, entry.write_batch_size, engine, tell, stack)
            elif entry.vae_batch_size > 1 and not part:
                tell(Notice(f"{entry.id}: {_in_batches('vae_batch_size', entry.vae_batch_size, 'pictures')}"))
            store = LiveLatents(images, recipe, encode, getattr(torch, dtype), keep=keep, pool=pool, tell=tell, part=part)
            stack.callback(_save, store, engine)
            stores.append(store)
        yield stores


@contextmanager
def lent_image_prompts(
    family: ModelFamily, sets: Sequence[ImageSet], engine: Engine, tell: Tell
) -> Iterator[ImagePrompts | None]:
    """What the denoiser is told of the pictures themselves, where the family is asked to."""
    asked = family.image_prompts()
    if asked is None:
        yield None
        return
    encoder, share = asked
    with lent_latents(sets, encoder, engine, tell, dtype="float32", part="image embeds") as stores:
        yield ImagePrompts(stores, share)


class FaultReport:
    """Tells of pictures that proved unreadable while training, whichever process met them, and notes them in the ledger."""

    def __init__(self, run: Run, sets: Sequence[ImageSet], latents: Sequence[Latents]) -> None:
        self._live = [store for store in latents if isinstance(store, LiveLatents)]
        self._sets = sets
        self._path = Path(run.checkpointing.output_dir) / "ledger.json"
        self._told: set[tuple[str, int]] = set()
        """Set and sample: each process that needs a picture meets its fault for itself."""
        self.due = Due(steps=run.reporting.log_step_interval, at_end=True, asked="save")

    def run(self, trainer: Trainer) -> None:
        """Gather and tell what was met since the last time."""
        if not self._live:
            return
        engine, is_found = trainer.engine, False
        for store in self._live:
            mine = [[one.sample, one.reason, one.detail, one.stand_in] for one in store.take_faults()]
            images = store.images
            for sample, reason, detail, stand_in in sorted(fault for share in engine.gather(mine) for fault in share):
                if (images.entry.id, sample) in self._told:
                    continue
                self._told.add((images.entry.id, sample))
                is_found = True
                text = f"{reason} ({detail})" if detail else reason
                stands_in = f"{images.file(stand_in)} takes its place"
                images.note(sample, f"unreadable, found while training: {text}; {stands_in}")
                trainer.tell(Notice(f"{images.entry.id}: {images.file(sample)} is unreadable: {text}; {stands_in}.", "warning"))
        if is_found:  # on all ranks alike; an account of a million pictures takes its time
            together(engine, lambda: self._write() if engine.rank == 0 else None)

    def _write(self) -> None:
        try:
            write_ledger(self._path, [images.ledger for images in self._sets])
        except OSError as error:
            raise RunError(f"{self._path} could not be written: {error}.", mend="make room there, and start again.") from error


def _exact(encode: Callable[P, R], engine: Engine) -> Callable[P, R]:
    """`encode`, which computes as before training although the loop has begun."""

    def encoded(*args: P.args, **kwargs: P.kwargs) -> R:
        with engine.encoding():
            return encode(*args, **kwargs)

    return encoded


def _on_disk(folder: Path, recipe: Recipe, write_batch_size: int, engine: Engine, tell: Tell, stack: ExitStack) -> OnDisk:
    """A cache that is written to until `stack` closes."""
    cache = TensorCache(folder, recipe)
    together(engine, lambda: cache.set_aside(tell) if engine.rank == 0 else None)
    return OnDisk(cache, stack.enter_context(cache.writer(write_batch_size)), is_shared=engine.ranks > 1)


def _save(store: LiveLatents, engine: Engine) -> None:
    if engine.rank == 0:
        store.save()


def _staying(what: str, encoders: str, *, is_cached: bool) -> str:
    where = "into the cache, when they are first used" if is_cached else "and not cached"
    return f"{what} are encoded while training, {where}. What encodes them stays loaded beside the model: {encoders}."


def _in_batches(option: str, size: int, what: str) -> str:
    return (
        f"{option} is {size}: {what} are encoded {size} together, to the same bits as for a cache, and what is not needed at "
        f"once is kept as long as there is room. For a set too large for that, {option} 1 is quicker."
    )
