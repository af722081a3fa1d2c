"""Latents of every picture, made once: read, decode, encode and write overlap, and only what changed is made again.

The encoder is called only where something is missing. What makes a picture's latents its own is its bytes and its place, so a
moved crop or a replaced file finds no entry and is encoded; a picture that cannot be read is left out and named.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simpletuner.data.cache import KEY_DTYPE, Item, Keys, TensorCache
from simpletuner.data.encoding import Encode, Ids, Spread, chunks_of, latent_items, latent_key, latent_recipe
from simpletuner.data.keep import Fetched, Pending
from simpletuner.data.pixels import Unreadable, read_pixels
from simpletuner.data.ranks import Ranks, together
from simpletuner.data.samples import PictureEncoder, Recipe
from simpletuner.errors import RunError
from simpletuner.events import Notice, Progress, Tell

if TYPE_CHECKING:
    from simpletuner.data.index import ImageSet, Remembered

__all__ = ["LatentStore", "fill_latents", "reason_of"]

Fetch = Callable[[], bytes]

SAVE_EVERY_S = 300.0
"""How much reading a kill may cost; encoded latents are safe much sooner."""
NAMED = 10
"""Files named in one line."""


@dataclass(frozen=True, eq=False)
class LatentStore:
    """The latents of one set, by sample."""

    cache: TensorCache
    keys: Keys
    """Of each sample; empty for one that is left out."""

    def get(self, sample: int) -> Tensor:
        """Latents (C, H, W), in the dtype they are stored in."""
        return self.cache.get(self.keys[sample].decode())["latents"]

    def fetch(self, samples: Sequence[int]) -> Fetched:
        """Latents of some samples, read now."""
        latents = [self.get(sample) for sample in samples]
        return Fetched(tuple(samples), Pending(lambda: latents, is_ready=True))


def fill_latents(
    sets: Sequence[ImageSet],
    encoder: PictureEncoder,
    *,
    dtype: str,
    device: str,
    ranks: Ranks,
    tell: Tell,
    part: str = "",
) -> list[LatentStore]:
    """Encode what is missing of all sets, all ranks together, and hand back where everything is.

    Latents are stored as `dtype` ("float16", "float32"). `part` names what is made besides the latents, after them: the
    manifest then notes nothing of it. Raises DataError for a set that has no readable picture.
    """
    recipe = latent_recipe(encoder, dtype)
    with encoder.lent(device) as encode:
        return [_Fill(images, recipe, encode, getattr(torch, dtype), ranks, tell, part).run() for images in sets]


@dataclass(frozen=True)
class _Picture:
    """A sample as the reading threads hand it over."""

    sample: int
    digest: bytes = b""
    key: str = ""
    reason: str = ""
    """Why it is to be encoded."""
    pixels: Tensor | None = None
    """None: its latents are there, or it is unreadable."""
    fault: tuple[str, str] | None = None
    """(reason, detail)."""


class _Fill:
    """One set on its way into the cache."""

    def __init__(
        self, images: ImageSet, recipe: Recipe, encode: Encode, dtype: torch.dtype, ranks: Ranks, tell: Tell, part: str
    ) -> None:
        self.images = images
        self.id = f"{images.entry.id} ({part})" if part else images.entry.id
        self.part = part
        self.recipe = recipe
        self.cache = TensorCache(images.cache_dir, recipe)
        self.encode = encode
        self.dtype = dtype
        self.ranks = ranks
        self.tell = tell
        self.keys = np.zeros(len(images), KEY_DTYPE)
        # what this rank did
        self.read: dict[int, str] = {}
        self.faults: list[tuple[int, str, str]] = []
        self.made: set[str] = set()
        self.reasons: Counter[str] = Counter()
        self.spread = Spread()

    def run(self) -> LatentStore:
        self._on_first(lambda: self.cache.set_aside(self.tell))
        alive = self.images.alive()
        outdated = self._recall(alive)
        shares = together(self.ranks, lambda: self._work(alive[~self.cache.held(self.keys[alive])]))
        self._take_in(shares)
        for sample in outdated:
            if (known := self.images.remembered(sample)) is not None:
                self._remember(sample, known.digest)
        self._on_first(self.images.save)
        self._tell_verdict(shares)
        self.images.check_usable()
        self.cache.refresh()
        if not self.cache.held(self.keys[self.images.alive()]).all():
            raise RunError(
                f"Latents of `{self.id}` are not in {self.cache.folder}, although all were written.",
                why="something else removed them meanwhile.",
                mend="Start the same command again: what is missing is made again.",
            )
        return LatentStore(self.cache, self.keys)

    def _on_first(self, work: Callable[[], None]) -> None:
        """On rank 0, while the others wait."""
        together(self.ranks, lambda: work() if self.ranks.rank == 0 else None)

    def _recall(self, alive: Ids) -> list[int]:
        """Set the keys of samples whose bytes are known; hand back those whose latents were last made in another way."""
        outdated = []
        for sample in alive.tolist():
            known = self.images.remembered(sample)
            if known is not None:
                key = latent_key(known.digest, self.images.place(sample))
                self.keys[sample] = key.encode()
                if not self.part and (known.latent_key, known.recipe) != (key, self.recipe.digest):
                    outdated.append(sample)
        return outdated

    def _remember(self, sample: int, digest: bytes) -> None:
        key = latent_key(digest, self.images.place(sample))
        self.keys[sample] = key.encode()
        if not self.part:
            self.images.remember(sample, digest, key, self.recipe.digest)

    def _work(self, todo: Ids) -> dict[str, Any]:
        """This rank's share: read, encode and write; what the other ranks must know of it."""
        chunks = _chunks(todo, self.images.bucket_ids, self.images.entry.vae_batch_size)[self.ranks.rank :: self.ranks.ranks]
        total, done, saved_s = sum(map(len, chunks)), 0, time.monotonic()
        if total:
            task = f"encoding pictures of {self.id}"
            self.tell(Progress(task, 0, total, "pictures"))
            with self.cache.writer(self.images.entry.write_batch_size) as writer:
                most = self.images.entry.read_batch_size
                fetched = _fetched(chunks, self.images.read, self.images.in_flight, most)
                for pictures in _ahead(fetched, self._read, most):
                    writer.add(self._encoded(self._fresh(pictures)))
                    done += len(pictures)
                    self.tell(Progress(task, done, total, "pictures"))
                    if self.ranks.rank == 0 and time.monotonic() - saved_s > SAVE_EVERY_S:
                        self.images.save()
                        saved_s = time.monotonic()
            if warning := self.spread.warning(self.id):
                self.tell(Notice(warning, "warning"))
        return {"read": list(self.read.items()), "faults": self.faults, "reasons": self.reasons}

    def _read(self, sample: int, fetch: Fetch) -> _Picture:
        """In a reading thread: bytes, their digest and, where the cache has no latents of it, pixels."""
        place = self.images.place(sample)
        try:
            raw = fetch()
            digest = hashlib.blake2b(raw, digest_size=16).digest()
            key = latent_key(digest, place)
            if self.cache.has(key):
                return _Picture(sample, digest, key)
            return _Picture(sample, digest, key, self._reason(sample, digest, key), read_pixels(raw, place))
        except Unreadable as fault:
            return _Picture(sample, fault=(fault.reason, fault.detail))

    def _reason(self, sample: int, digest: bytes, key: str) -> str:
        """Why a picture is encoded."""
        if self.part:
            return "not in the cache"
        return reason_of(self.images.remembered(sample) or self.images.previous(sample), digest, key, self.recipe)

    def _fresh(self, pictures: Sequence[_Picture]) -> list[_Picture]:
        """Note what was learned of a chunk; hand back what must be encoded: of identical pictures only the first."""
        fresh = []
        for picture in pictures:
            if picture.fault is not None:
                self.faults.append((picture.sample, *picture.fault))
                continue
            if picture.pixels is not None and picture.key not in self.made:
                self.made.add(picture.key)
                fresh.append(picture)
            self.read[picture.sample] = picture.digest.hex()
            self._remember(picture.sample, picture.digest)
        return fresh

    def _encoded(self, pictures: Sequence[_Picture]) -> list[Item]:
        if not pictures:
            return []
        pixels_B3HW = torch.stack([picture.pixels for picture in pictures if picture.pixels is not None])
        keys = [picture.key for picture in pictures]
        latents_BCHW = self.encode(pixels_B3HW, keys)
        if not self.part:
            self.spread.add(latents_BCHW)
        self.reasons.update(picture.reason for picture in pictures)
        return latent_items(self.images, [picture.sample for picture in pictures], keys, latents_BCHW, self.dtype)

    def _take_in(self, shares: Sequence[dict[str, Any]]) -> None:
        """What any rank learned, all ranks know, in the same order."""
        for sample, digest in sorted(pair for share in shares for pair in map(tuple, share["read"])):
            self._remember(sample, bytes.fromhex(digest))
        faults = sorted(tuple(fault) for share in shares for fault in share["faults"])
        for sample, reason, detail in faults:
            self.images.exclude(sample, reason, detail)
        if faults:
            names = [f"{self.images.file(sample)} ({reason})" for sample, reason, _ in faults]
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            self.tell(Notice(f"{self.id}: {len(names):,} left out: {', '.join(names[:NAMED])}{more}", "warning"))

    def _tell_verdict(self, shares: Sequence[dict[str, Any]]) -> None:
        reasons = sum((Counter(share["reasons"]) for share in shares), Counter[str]())
        self.tell(Notice(_verdict(self.id, len(self.images.alive()), reasons)))


def reason_of(known: Remembered | None, digest: bytes, key: str, recipe: Recipe) -> str:
    """Why a picture of these bytes has no latents under `key`, by what was learned when it was last encoded."""
    if known is None:
        return "new"
    if known.digest != digest:
        return "picture changed"
    if known.recipe != recipe.digest:
        return "encoder changed"
    return "crop changed" if known.latent_key != key else "not in the cache"


def _chunks(todo: Ids, bucket_ids: NDArray[np.integer[Any]], size: int) -> list[Ids]:
    """What is to be encoded at once: pictures of one bucket that are still to do.

    Chunks are cut from all samples, in their order, and then lose what is done: what a kill left over is encoded in the same
    batches as if there had been no kill, and so to the same bits. Empty chunks stay, so that all ranks deal out the same list.
    """
    is_todo = np.zeros(len(bucket_ids), np.bool_)
    is_todo[todo] = True
    return [samples[is_todo[samples]] for samples in chunks_of(bucket_ids, size)]


_Awaited = tuple[int, Fetch]
"""A sample and the call that gives its bytes."""


def _fetched(
    chunks: Sequence[Ids], read: Callable[[int], bytes], in_flight: int, most: int | None
) -> Generator[list[_Awaited], None, None]:
    """Chunks of samples, each with the call that gives its bytes.

    Where bytes take a while to come, threads of their own ask for them ahead of time, more than there are cores to decode:
    at most `most` pictures (unset: twice as many as there are threads), or the next chunk.
    """
    most = 2 * in_flight if most is None else most
    if in_flight == 1:
        for chunk in chunks:
            yield [(sample, partial(read, sample)) for sample in chunk.tolist()]
        return
    waiting: deque[list[_Awaited]] = deque()
    with ThreadPoolExecutor(in_flight, thread_name_prefix="fetch-pictures") as pool:
        try:
            for chunk in chunks:
                waiting.append([(sample, pool.submit(read, sample).result) for sample in chunk.tolist()])
                if sum(map(len, waiting)) > most:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ahead(
    chunks: Generator[list[_Awaited], None, None], read: Callable[[int, Fetch], _Picture], most: int | None
) -> Iterator[list[_Picture]]:
    """Chunks of pictures in their order, read by threads while the caller works.

    At most `most` pictures (unset: twice as many as there are threads), or the next chunk, are read ahead.
    """
    workers = min(16, _cores())
    most = 2 * workers if most is None else most
    with closing(chunks), ThreadPoolExecutor(workers, thread_name_prefix="read-pictures") as pool:
        waiting: deque[list[Future[_Picture]]] = deque()
        try:
            for chunk in chunks:
                if chunk:
                    waiting.append([pool.submit(read, *one) for one in chunk])
                if len(waiting) > 1 and sum(map(len, waiting)) > most:
                    yield [picture.result() for picture in waiting.popleft()]
            while waiting:
                yield [picture.result() for picture in waiting.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use: a container or a job manager often gives fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _verdict(dataset: str, usable: int, reasons: Counter[str]) -> str:
    """`cats: 1,204 reused, 37 encoded (crop changed)`"""
    encoded = reasons.total()
    text = f"{dataset}: {usable - encoded:,} reused"
    if not encoded:
        return text
    if len(reasons) == 1:
        return f"{text}, {encoded:,} encoded ({next(iter(reasons))})"
    return f"{text}, {encoded:,} encoded ({', '.join(f'{count:,} {reason}' for reason, count in reasons.most_common())})"
