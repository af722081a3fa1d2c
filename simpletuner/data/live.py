"""Latents made while training, for a set that has no cache (`vae_cache_disable`) or fills it as it goes (`vae_cache_ondemand`).

Pictures are encoded in the chunks that a cache would be filled by, to the same bits. One that proves unreadable is replaced by
the next readable one of its bucket: which one depends on the files alone, so every rank and a resumed run choose alike.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from simpletuner.data.cache import KEY_DTYPE
from simpletuner.data.encoding import Encode, Ids, Spread, chunks_of, latent_items, latent_key
from simpletuner.data.keep import Fetched, Keep, Pending
from simpletuner.data.pixels import Unreadable, read_pixels
from simpletuner.data.samples import Recipe
from simpletuner.errors import RunError
from simpletuner.events import Notice, Tell

if TYPE_CHECKING:
    from simpletuner.data.index import ImageSet

__all__ = ["Fault", "LiveLatents"]

SAVE_EVERY_S = 300.0
"""How much reading a kill may cost."""


@dataclass(frozen=True)
class Fault:
    """A picture that proved unreadable while training."""

    sample: int
    reason: str
    detail: str
    stand_in: int


@dataclass(frozen=True)
class _Picture:
    """A sample as the reading threads hand it over."""

    sample: int
    key: str = ""
    pixels: Tensor | None = None
    """None: its latents are kept already, or it is unreadable."""


@dataclass(frozen=True)
class _Wanted:
    """A sample whose latents are there, or the chunk that it is to be encoded with."""

    sample: int
    key: str
    latents: Tensor | None
    chunk: tuple[_Picture, ...] = ()


class LiveLatents:
    """The latents of one set, by sample. `fetch` is for the one thread that reads ahead, the rest for the loop's own."""

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        encode: Encode,
        dtype: torch.dtype,
        *,
        keep: Keep,
        pool: ThreadPoolExecutor,
        tell: Tell,
        part: str = "",
    ) -> None:
        """`part` names what is made besides the latents: the manifest notes nothing of it."""
        self.images = images
        self._recipe = recipe
        self._encode = encode
        self._dtype = dtype
        self._keep = keep
        self._pool = pool
        self._tell = tell
        self._keys = np.zeros(len(images), KEY_DTYPE)
        is_alive = np.zeros(len(images), np.bool_)
        is_alive[images.alive()] = True
        chunks = chunks_of(images.bucket_ids, images.entry.vae_batch_size)
        self._chunks: list[Ids] = [samples[is_alive[samples]] for samples in chunks]
        self._chunk_of = np.zeros(len(images), np.int64)
        for number, samples in enumerate(self._chunks):
            self._chunk_of[samples] = number
        self._unreadable: dict[int, Unreadable] = {}
        self._stand_ins: dict[int, int] = {}
        self._untold: list[Fault] = []
        self._spread: Spread | None = None if part else Spread()
        self._notes = keep.is_lasting and not part
        if keep.is_lasting:
            self._recall()
        self._saved_s = time.monotonic()

    def fetch(self, samples: Sequence[int]) -> Fetched:
        """Read the pictures that are not kept. Raises RunError if a bucket has no readable one."""
        reading = {number: self._read_chunk(number) for number in self._missing(samples)}
        wanted = [self._resolved(sample, reading) for sample in samples]

        def finish() -> list[Tensor]:
            return [self._made(one) for one in wanted]

        is_ready = all(one.latents is not None for one in wanted)
        return Fetched(tuple(one.sample for one in wanted), Pending(finish, is_ready))

    def get(self, sample: int) -> Tensor:
        """Latents (C, H, W) of a sample or its stand-in, at once."""
        return self.fetch([sample]).latents.finish()[0]

    def take_faults(self) -> list[Fault]:
        """The pictures that proved unreadable since the last call."""
        found, self._untold = self._untold, []
        return found

    def save(self) -> None:
        """Keep what was learned of the files for the next run, where there is a cache to find."""
        if self._notes:
            self.images.save()

    # reading

    def _recall(self) -> None:
        """The keys of samples whose bytes are known from an earlier run."""
        for sample in self.images.alive().tolist():
            if (known := self.images.remembered(sample)) is not None:
                self._keys[sample] = latent_key(known.digest, self.images.place(sample)).encode()

    def _kept(self, sample: int) -> Tensor | None:
        key = self._keys[sample].decode()
        item = self._keep.get(key) if key else None
        return None if item is None else item["latents"]

    def _missing(self, samples: Sequence[int]) -> list[int]:
        """The chunks that are to be read, in order."""
        chosen = [self._stand_ins.get(sample, sample) for sample in samples]
        return sorted({int(self._chunk_of[sample]) for sample in chosen if self._kept(sample) is None})

    def _read_chunk(self, number: int) -> list[Future[_Picture]]:
        samples = [sample for sample in self._chunks[number].tolist() if sample not in self._unreadable]
        return [self._pool.submit(self._read, sample) for sample in samples]

    def _read(self, sample: int) -> _Picture:
        """In a thread of the pool."""
        place = self.images.place(sample)
        try:
            raw = self.images.read(sample)
            digest = hashlib.blake2b(raw, digest_size=16).digest()
            key = latent_key(digest, place)
            is_kept = self._keep.is_lasting and self._keep.has(key)
            picture = _Picture(sample, key, None if is_kept else read_pixels(raw, place))
        except Unreadable as fault:
            self._unreadable[sample] = fault
            return _Picture(sample)
        self._keys[sample] = key.encode()
        if self._notes:
            self.images.remember(sample, digest, key, self._recipe.digest)
        return picture

    def _resolved(self, sample: int, reading: dict[int, list[Future[_Picture]]]) -> _Wanted:
        """The sample, or the first readable one after it."""
        for chosen in self._candidates(sample):
            kept = self._kept(chosen)
            if kept is None:
                number = int(self._chunk_of[chosen])
                if number not in reading:
                    reading[number] = self._read_chunk(number)
                chunk = tuple(future.result() for future in reading[number])
                if chosen in self._unreadable:
                    continue
                kept = self._kept(chosen)  # a picture just read may be one that is kept under another name
                wanted = _Wanted(chosen, self._keys[chosen].decode(), kept, chunk if kept is None else ())
            else:
                wanted = _Wanted(chosen, self._keys[chosen].decode(), kept)
            if chosen != sample and sample not in self._stand_ins:
                self._stand_ins[sample] = chosen
                fault = self._unreadable[sample]
                self._untold.append(Fault(sample, fault.reason, fault.detail, chosen))
            return wanted
        raise self._nothing_readable(sample)

    def _candidates(self, sample: int) -> Iterator[int]:
        """A sample, then the others of its bucket in their order, round to the beginning."""
        yield self._stand_ins.get(sample, sample)
        alive = self.images.alive()
        mates = alive[self.images.bucket_ids[alive] == self.images.bucket_ids[sample]]
        after = int(np.searchsorted(mates, sample, side="right"))
        yield from (mate for mate in np.roll(mates, -after).tolist() if mate != sample)

    def _nothing_readable(self, sample: int) -> RunError:
        width, height = self.images.buckets[int(self.images.bucket_ids[sample])]
        fault = self._unreadable[sample]
        return RunError(
            f"Dataset `{self.images.entry.id}`: no picture of the bucket {width}x{height} can be read.",
            why=f"{self.images.file(sample)}: {fault.reason} ({fault.detail}); no other can stand in for it.",
            mend="replace the unreadable files; without `vae_cache_disable` and `vae_cache_ondemand` they are found at start.",
        )

    # encoding

    def _made(self, one: _Wanted) -> Tensor:
        """The latents of a sample, encoded now unless they came to be kept meanwhile."""
        if one.latents is not None:
            return one.latents
        if (item := self._keep.get(one.key)) is not None:
            return item["latents"]
        fresh: dict[str, tuple[int, Tensor]] = {}
        for picture in one.chunk:
            if picture.pixels is not None and not self._keep.has(picture.key):
                fresh.setdefault(picture.key, (picture.sample, picture.pixels))  # of identical pictures only the first
        latents_BCHW = self._encode(torch.stack([pixels for _, pixels in fresh.values()]), list(fresh))
        self._watch_spread(latents_BCHW)
        items = latent_items(self.images, [sample for sample, _ in fresh.values()], list(fresh), latents_BCHW, self._dtype)
        self._keep.put(items)
        if time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()
            self._saved_s = time.monotonic()
        return dict(items)[one.key]["latents"]

    def _watch_spread(self, latents_BCHW: Tensor) -> None:
        if self._spread is None:
            return
        self._spread.add(latents_BCHW)
        if self._spread.is_telling:
            if warning := self._spread.warning(self.images.entry.id):
                self._tell(Notice(warning, "warning"))
            self._spread = None
