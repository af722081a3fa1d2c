"""Open a set of pictures: find them, sort them into buckets, and account for every one that is left out.

A second start opens no file that has not changed. Nothing is ever written into the user's folder.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.cache import NO_RIGHT
from simpletuner.data.captions import LARGEST_TEXT_BYTES, TABLED, captions_of, has_caption, wants_texts
from simpletuner.data.discovery import CANNOT_OPEN, TEXT_FILES, caption_file, discover
from simpletuner.data.geometry import WH, Fitter, Misfit, asked_sizes, enlargement
from simpletuner.data.ledger import Exclusion, Ledger, Note
from simpletuner.data.manifest import UNKNOWN, Ints, Manifest, Remembered, load_manifest, save_manifest
from simpletuner.data.masks import NO_MASK, Masks
from simpletuner.data.pixels import Unreadable
from simpletuner.data.samples import LatentSpec, Place, draw_seed
from simpletuner.data.stores.base import READABLE, Store
from simpletuner.data.stores.choice import store_of
from simpletuner.data.stores.tabled import NOT_IN_TABLE
from simpletuner.data.stores.urls import DEAD
from simpletuner.errors import DataError, RunError
from simpletuner.events import Notice, Progress, Tell

__all__ = ["ImageSet", "Remembered", "open_dataset"]

NAMED = 10
"""Files named in an error; the others are counted."""

NOTED_ENLARGEMENT = 2.0
NO_CAPTION = "no caption"

MENDS = {
    "too small": "use larger pictures, or lower minimum_edge_px",
    "below minimum_image_size": "lower minimum_image_size",
    "too narrow": "lower minimum_aspect_ratio",
    "too wide": "raise maximum_aspect_ratio",
    NO_CAPTION: "add captions",
    NO_MASK: "add masks, of the same paths and names as the pictures",
    "changed": "start again; or, if a table says the sizes, correct them: they are those of the pictures as they stand upright",
    CANNOT_OPEN: "give this user the right to read the files",
    NOT_IN_TABLE: "correct `filename_column` or `identifier_includes_extension`, so that the table names the files",
    DEAD: "correct the URLs, or start again when their servers answer",
}
"""What to do about pictures excluded for a reason; about any other, replace them."""


def open_dataset(entry: ImageDataset, latent: LatentSpec, *, tell: Tell, is_searched: bool = False) -> ImageSet:
    """Find, measure and sort the pictures of a set. `is_searched`: another rank has just done so, and its word is taken.

    Told: progress while headers are read, and a resolution that is off the alignment. Raises DataError if no picture is
    usable, or if captions are missing that `caption_missing` asks for.
    """
    assert entry.cache_dir_vae is not None, "a Run's datasets have their cache folders"
    store = store_of(entry)
    path = Path(entry.cache_dir_vae) / f"manifest-{_safe(entry.id)}.safetensors"
    old = _load(entry, path, tell)
    known: tuple[Manifest, list[Note]] | None = (old, []) if old is not None and is_searched else None
    manifest, notes = known or _manifest_of(entry, store, old, path, tell)
    if not len(manifest):
        raise DataError(
            f"no images detected in dataset {entry.id}: {store.root} holds no picture.",
            why=f"searched with its sub-folders, hidden ones left out, for files ending in {READABLE.replace(' ', ', ')}.",
            mend=f"put pictures into it, or correct {store.key}.",
        )
    chosen = _choose(entry, latent, manifest)
    if entry.caption_missing != "skip" and chosen.without_caption:
        raise _captions_missing(entry, chosen, found=len(manifest))
    images = ImageSet(entry, latent, store, manifest, path, chosen, notes)
    images.check_usable()
    for size_WH, taken_WH in asked_sizes(entry, latent).items():
        if taken_WH != size_WH:
            asked, taken = (f"{width}x{height}" for width, height in (size_WH, taken_WH))
            tell(Notice(f"{entry.id}: resolution {asked} becomes {taken}: edges are multiples of {latent.alignment_px} px."))
    return images


class ImageSet:
    """The usable pictures of one set. Sample i is the i-th of them in the order of their paths.

    A sample that turns out unreadable later is excluded, but keeps its number.
    """

    def __init__(
        self,
        entry: ImageDataset,
        latent: LatentSpec,
        store: Store,
        manifest: Manifest,
        path: Path,
        chosen: Chosen,
        notes: list[Note],
    ) -> None:
        self.entry = entry
        self.store = store
        """Where the pictures are."""
        self.in_flight = store.in_flight
        """Calls of `read` that should be under way at once; 1: it waits for nothing."""
        self.cache_dir = path.parent
        """Where latents and the manifest are kept."""
        self.buckets = tuple(sorted(chosen.buckets))
        """The sizes (width, height) trained at."""
        rank = {bucket: index for index, bucket in enumerate(self.buckets)}
        ranks = np.array([rank[bucket] for bucket in chosen.buckets], np.int32)
        self.bucket_ids: NDArray[np.int32] = ranks[np.array(chosen.bucket_numbers, np.int32)]
        """Sample -> its bucket."""
        self._fitter = Fitter(entry, latent)
        self._manifest = manifest
        self._path = path
        self._rows = np.array(chosen.rows, np.int64)
        self._is_alive = np.ones(len(chosen.rows), bool)
        self._excluded = [*chosen.excluded, *chosen.without_caption]
        self._notes = [*notes, *chosen.notes]
        self._is_saved = True
        self.masks: Masks | None = None
        """Of its pictures, where it has them."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def manifest_path(self) -> Path:
        """Where what is known of its pictures is kept."""
        return self._path

    def file(self, sample: int) -> str:
        """Its path within the set, with `/`."""
        return self._manifest.files.at(self._rows[sample])

    def read(self, sample: int) -> bytes:
        """The bytes of its file. Raises Unreadable."""
        try:
            return self.store.read(self.file(sample))
        except OSError as error:
            raise Unreadable(CANNOT_OPEN, error.strerror or str(error)) from error

    def place(self, sample: int) -> Place:
        """How it becomes its bucket's size."""
        width, height = self._manifest.edges[self._rows[sample]].tolist()
        place = self._fitter.fit((width, height), _key(self.entry, self.file(sample)))
        assert isinstance(place, Place)
        return place

    def captions(self, sample: int) -> tuple[str, ...]:
        """Its captions, alternatives of one another; at least one."""
        return captions_of(self.entry, self.file(sample), self._manifest.captions.at(self._rows[sample]))

    def alive(self) -> Ints:
        """The samples not excluded."""
        return np.flatnonzero(self._is_alive)

    @property
    def file_bytes(self) -> int:
        """Of all files that were found, as far as the store tells their sizes."""
        return int(self._manifest.sizes.clip(min=0).sum())

    def remembered(self, sample: int) -> Remembered | None:
        """What was learned when its file, unchanged since, was last encoded."""
        return self.previous(sample) if self._manifest.is_current[self._rows[sample]] else None

    def previous(self, sample: int) -> Remembered | None:
        """What was learned when its file was last encoded, even if it has changed since."""
        return self._manifest.remembered(self._rows[sample])

    def remember(self, sample: int, digest: bytes, latent_key: str, recipe: str) -> None:
        """Keep what was learned of its file as it is now, for the next `save`."""
        self._manifest.remember(self._rows[sample], Remembered(digest, latent_key, recipe))
        self._is_saved = False

    def exclude(self, sample: int, reason: str, detail: str = "") -> None:
        """Leave out a sample whose file proved unreadable; it stays out, unread, until the file changes."""
        self.leave_out(sample, reason, detail)
        self._manifest.faults[int(self._rows[sample])] = (reason, detail)
        self._is_saved = False

    def leave_out(self, sample: int, reason: str, detail: str = "") -> None:
        """Leave out a sample of this run, for a reason that is not its file's."""
        self._is_alive[sample] = False
        self._excluded.append(Exclusion(self.file(sample), reason, detail))

    def pair(self, masks: Masks) -> None:
        """Take `masks` for this set's: pictures without one are left out. Raises DataError if none is left."""
        self.masks = masks
        self._notes += masks.without_picture(self.file(sample) for sample in range(len(self)))
        for sample in self.alive().tolist():
            if masks.of(self.file(sample)) is None:
                self.leave_out(sample, NO_MASK, f"there is none of its name in {masks.root}")
        self.check_usable()

    def note(self, sample: int, text: str) -> None:
        """Say in the ledger what came to light of a sample."""
        self._notes.append(Note(self.file(sample), text))

    def check_usable(self) -> None:
        """Raise DataError if no sample is left."""
        if self._is_alive.any():
            return
        files = _named([f"{one.file}: {one.reason} ({one.detail})" for one in self._excluded])
        mends = {MENDS.get(one.reason, "replace the unreadable files") for one in self._excluded}
        found = f"none of the {len(self._manifest):,} pictures in {self.store.root} can be used"
        raise DataError(
            f"no images detected in dataset {self.entry.id}: {found}.",
            why="\n      ".join(files),
            mend=", and ".join(sorted(mends)) + ".",
        )

    @property
    def ledger(self) -> Ledger:
        """The account of the set as it now stands."""
        excluded = sorted(self._excluded, key=lambda exclusion: exclusion.file)
        return Ledger(
            self.entry.id, len(self._manifest), tuple(excluded), (*self._notes, *self._twins()), self.entry.dataset_type
        )

    def save(self) -> None:
        """Write the manifest, if there is something new in it. Raises RunError."""
        if not self._is_saved:
            _save(self.entry, self._manifest, self._path)
            self._is_saved = True

    def _twins(self) -> list[Note]:
        """Pictures equal byte for byte to an earlier one, as far as digests are known."""
        samples = np.flatnonzero(self._is_alive & self._manifest.is_current[self._rows])
        digests = self._manifest.digests[self._rows[samples]]
        _, firsts, kinds = np.unique(digests, return_index=True, return_inverse=True)
        firsts = samples[firsts[kinds]]
        again = firsts != samples
        pairs = zip(samples[again].tolist(), firsts[again].tolist(), strict=True)
        return [Note(self.file(sample), f"identical to {self.file(first)}") for sample, first in pairs]


@dataclass
class Chosen:
    """The pictures of a manifest, sorted into usable and not."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    bucket_numbers: array[int] = field(default_factory=lambda: array("i"))
    """Of each usable row."""
    buckets: dict[WH, int] = field(default_factory=dict)
    """The number of each bucket, in the order in which they occur."""
    excluded: list[Exclusion] = field(default_factory=list)
    without_caption: list[Exclusion] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def _manifest_of(
    entry: ImageDataset, store: Store, old: Manifest | None, path: Path, tell: Tell
) -> tuple[Manifest, list[Note]]:
    """What is known of the set's store, searched unless `skip_file_discovery` says otherwise; and folders to tell of."""
    captions_from = TEXT_FILES if wants_texts(entry) else store.captions_from
    if entry.skip_file_discovery or entry.preserve_data_backend_cache:
        key = "skip_file_discovery" if entry.skip_file_discovery else "preserve_data_backend_cache"
        if old is not None and old.root == store.root and captions_from in ("", old.captions_from):
            tell(Notice(f"{entry.id}: the last manifest is used, and the folder not searched ({key})."))
            return old, []
        tell(Notice(f"{entry.id}: there is no manifest of {store.root} yet, so it is searched in spite of {key}."))
    listing = store.listing(tell)
    if "" in listing.closed:
        raise DataError(
            f"Dataset `{entry.id}`: the folder {store.root} cannot be searched: {listing.closed['']}.",
            mend=f"correct {store.key}, or make the folder.",
        )

    def progress(done: int, total: int) -> None:
        tell(Progress(f"{entry.id}: measuring", done, total, "pictures"))

    manifest = discover(store, listing, old, captions_from=captions_from, progress=progress)
    if manifest is not old:
        _save(entry, manifest, path)
    notes = [Note(folder, f"folder not searched: {why}") for folder, why in sorted(listing.closed.items())]
    for note in notes:
        tell(Notice(f"{entry.id}: {note.file}: {note.note}", level="warning"))
    return manifest, [*notes, *(Note(file, note) for file, note in listing.notes.items())]


def _choose(entry: ImageDataset, latent: LatentSpec, manifest: Manifest) -> Chosen:
    """Sort pictures into usable and not, in the order of the manifest."""
    chosen = Chosen()
    fitter = Fitter(entry, latent)
    for row, (file, size_WH, text) in enumerate(manifest.pictures()):
        if row in manifest.faults:
            chosen.excluded.append(Exclusion(file, *manifest.faults[row]))
            continue
        place = fitter.sized(size_WH, _key(entry, file))
        if isinstance(place, Misfit):
            chosen.excluded.append(Exclusion(file, place.reason, place.detail))
        elif not has_caption(entry, file, text):
            chosen.without_caption.append(Exclusion(file, NO_CAPTION, _why_no_caption(entry, file, manifest, row)))
        else:
            chosen.rows.append(row)
            chosen.bucket_numbers.append(chosen.buckets.setdefault(place.target_WH, len(chosen.buckets)))
            if (times := enlargement(place)) > NOTED_ENLARGEMENT:
                width, height = size_WH
                chosen.notes.append(Note(file, f"enlarged {times:.1f} times, from {width}x{height}"))
    limit = entry.max_num_samples
    return chosen if limit is None or limit >= len(chosen.rows) else _some(chosen, limit, entry, manifest)


def _some(chosen: Chosen, count: int, entry: ImageDataset, manifest: Manifest) -> Chosen:
    """`count` of the usable pictures. Each file has its own draw, so that most of a choice stays when files come or go."""
    files = [manifest.files.at(row) for row in chosen.rows]
    draws = np.array([draw_seed(_key(entry, file), "choice") for file in files], np.int64)
    is_kept = np.zeros(len(files), bool)
    is_kept[np.argsort(draws, kind="stable")[:count]] = True
    sizes_WH = list(chosen.buckets)
    some = Chosen(excluded=chosen.excluded, without_caption=chosen.without_caption)
    for kept, file, row, number in zip(is_kept.tolist(), files, chosen.rows, chosen.bucket_numbers, strict=True):
        if kept:
            some.rows.append(row)
            some.bucket_numbers.append(some.buckets.setdefault(sizes_WH[number], len(some.buckets)))
        else:
            some.excluded.append(Exclusion(file, "not chosen", f"max_num_samples is {count:,}"))
    used = {file for kept, file in zip(is_kept.tolist(), files, strict=True) if kept}
    some.notes = [note for note in chosen.notes if note.file in used]
    return some


def _key(entry: ImageDataset, file: str) -> str:
    """By which random crops and aspects, and the pictures that are used, are drawn."""
    return f"{entry.id}/{file}"


def _why_no_caption(entry: ImageDataset, file: str, manifest: Manifest, row: int) -> str:
    if entry.caption_strategy == "filename":
        return "its name holds no words"
    if entry.caption_strategy == "instanceprompt":
        return "instance_prompt is not set"
    if entry.caption_strategy in TABLED:
        return f"{manifest.captions_from} says none"
    text = caption_file(file)
    if manifest.caption_sizes[row] == UNKNOWN:
        return f"there is no {text} that can be opened"
    if manifest.caption_sizes[row] > LARGEST_TEXT_BYTES:
        return f"{text} is too large for a caption: more than {LARGEST_TEXT_BYTES // 2**20} MiB"
    return f"{text} is empty" if not manifest.caption_sizes[row] else f"{text} holds no text, or none in UTF-8"


def _captions_missing(entry: ImageDataset, chosen: Chosen, *, found: int) -> DataError:
    missing = chosen.without_caption
    first = f"{missing[0].file}: {missing[0].detail}."
    files = ", ".join(_named([exclusion.file for exclusion in missing]))
    wants = {
        "filename": "takes the words of each file's name.",
        "textfile": "wants a .txt of the same name beside each picture.",
        "instanceprompt": "wants `instance_prompt`.",
        **dict.fromkeys(TABLED, "wants a text in each picture's row."),
    }
    return DataError(
        f"Dataset `{entry.id}`: {len(missing):,} of {found:,} pictures have no caption: {files}.",
        why=f'caption_strategy "{entry.caption_strategy}" {wants[entry.caption_strategy]} {first}',
        mend='add the captions, or set "caption_missing" to "skip", or to "instance_prompt" with an `instance_prompt`.',
    )


def _named(names: list[str]) -> list[str]:
    """The first few, and how many more."""
    return names if len(names) <= NAMED else [*names[:NAMED], f"and {len(names) - NAMED:,} more"]


def _load(entry: ImageDataset, path: Path, tell: Tell) -> Manifest | None:
    try:
        return load_manifest(path)
    except SafetensorError as error:
        tell(Notice(f"{entry.id}: the manifest {path} is damaged ({error}); the folder is measured afresh.", level="warning"))
        return None


def _save(entry: ImageDataset, manifest: Manifest, path: Path) -> None:
    try:
        save_manifest(manifest, path)
    except OSError as error:
        no_right = error.errno in NO_RIGHT
        what = f"Dataset `{entry.id}`: the manifest {path} cannot be written: {error.strerror or error}."
        mend = f"{'make the folder writable' if no_right else 'free space there'}, or set cache_dir_vae to another folder."
        raise (DataError if no_right else RunError)(what, mend=mend) from error


def _safe(name: str) -> str:
    """A dataset's id as part of a file's name; one that had to be altered stays unique by a hash."""
    safe = re.sub(r"[^\w.-]", "_", name)[:80]
    return safe if safe == name else f"{safe}-{blake2b(name.encode(), digest_size=4).hexdigest()}"
