"""Discovery: what a store holds becomes a manifest, for which only what is new in it is read.

Gives the manifest of everything found; what of it is used, and how, is decided in `index.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.captions import LARGEST_TEXT_BYTES, decode
from simpletuner.data.geometry import WH
from simpletuner.data.manifest import UNKNOWN, Ints, Manifest, Texts
from simpletuner.data.pixels import Unreadable
from simpletuner.data.stores.base import NO_FILE, Listing, Store, in_order

__all__ = ["CANNOT_OPEN", "TEXT_FILES", "caption_file", "discover"]

CANNOT_OPEN = "cannot be opened"
"""The one reason that is no fault of a file's bytes: it is tried again at every start."""

TEXT_FILES = "textfile"
"""`captions_from` of a manifest whose captions were read from the files beside the pictures."""

TELL_EVERY_S = 0.5


def discover(
    store: Store, listing: Listing, old: Manifest | None, *, captions_from: str, progress: Callable[[int, int], None]
) -> Manifest:
    """The manifest of what was found, for which only what is not as in `old` is read. `old` itself if nothing is new.

    `captions_from` names their source: "" (none is wanted), TEXT_FILES, or the table that the listing has them from.
    `progress` is told how many pictures are measured and how many there are to measure. What cannot be read is a fault.
    """
    if old is None or old.root != store.root:
        old = Manifest.empty(store.root)
    files = listing.files
    row_of = {file: row for row, file in enumerate(old.files.strings())}
    rows = np.fromiter((row_of.get(file, -1) for file in files), np.int64, len(files))
    del row_of  # a million paths: gone before as many captions come
    beside = [caption_file(file) for file in files] if captions_from == TEXT_FILES else []
    caption_sizes, caption_times = _stamps(listing, beside, len(files))

    again = [row for row, (reason, _) in old.faults.items() if reason == CANNOT_OPEN]
    same = _unchanged(rows, (old.sizes, listing.sizes), (old.times, listing.times)) & ~np.isin(rows, again)
    same_captions = _unchanged(rows, (old.caption_sizes, caption_sizes), (old.caption_times, caption_times))
    same_captions &= old.captions_from == captions_from  # a table's caption is not what a missing file says
    is_in_order = len(old) == len(files) and bool((rows == np.arange(len(files))).all())
    if is_in_order and same.all() and same_captions.all() and _tells_nothing_new(listing, old):
        return old

    carried = np.flatnonzero(same & np.isin(rows, list(old.faults))).tolist()
    new = Manifest(
        root=store.root,
        captions_from=captions_from,
        files=Texts.of(files),
        sizes=listing.sizes,
        times=listing.times,
        edges=_carried(old.edges, rows),
        caption_sizes=caption_sizes,
        caption_times=caption_times,
        captions=listing.captions or _captions(store, beside, old, np.where(same_captions, rows, -1), caption_sizes),
        faults={row: old.faults[rows[row]] for row in carried} | listing.faults,
        digests=_carried(old.digests, rows),
        latent_keys=_carried(old.latent_keys, rows),
        recipes=_carried(old.recipes, rows),
        is_current=_carried(old.is_current, rows) & same,
    )
    new.edges[~same] = 0
    unknown = ~same & ~np.isin(np.arange(len(files)), list(listing.faults))
    if listing.edges is not None:
        is_told = listing.edges.all(axis=1)
        new.edges[is_told] = listing.edges[is_told]
        unknown &= ~is_told
    _measure(store, new, files, np.flatnonzero(unknown).tolist(), progress)
    return new


def caption_file(file: str) -> str:
    """The path of the caption file beside a picture."""
    return file.rpartition(".")[0] + ".txt"


def _stamps(listing: Listing, beside: Sequence[str], count: int) -> tuple[Ints, Ints]:
    """Sizes and times of the caption files, as of no file where none is wanted."""
    stamps_N2 = np.full((count, 2), NO_FILE, np.int64)
    if beside:
        stamps_N2[:] = [listing.texts.get(text, NO_FILE) for text in beside]
    return stamps_N2[:, 0].copy(), stamps_N2[:, 1].copy()


def _unchanged(rows: Ints, *pairs: tuple[Ints, Ints]) -> NDArray[np.bool_]:
    """Where a picture has a row in the old columns, and the new ones say the same."""
    return np.logical_and.reduce([rows >= 0, *(_carried(old, rows) == new for old, new in pairs)])


def _tells_nothing_new(listing: Listing, old: Manifest) -> bool:
    """Whether a manifest of the same files already has what the listing knows beyond them."""
    if any(old.faults.get(row) != fault for row, fault in listing.faults.items()):
        return False
    captions = listing.captions
    return captions is None or (
        np.array_equal(captions.offsets, old.captions.offsets) and np.array_equal(captions.blob, old.captions.blob)
    )


def _carried(column: NDArray[Any], rows: Ints) -> NDArray[Any]:
    """An old column in the new order: `rows` are the old ones, -1 for what is new and gets zero."""
    values = np.zeros((len(rows), *column.shape[1:]), column.dtype)
    values[rows >= 0] = column[rows[rows >= 0]]
    return values


def _measure(
    store: Store, manifest: Manifest, files: Sequence[str], rows: list[int], progress: Callable[[int, int], None]
) -> None:
    """Fill in edges and faults of these rows."""
    told_at = time.monotonic()
    measured = in_order(partial(_measured, store), (files[row] for row in rows), store.in_flight)
    for done, (row, found) in enumerate(zip(rows, measured, strict=True), 1):
        if isinstance(found, Unreadable):
            manifest.faults[row] = (found.reason, found.detail)
        else:
            manifest.edges[row] = found
        if (now := time.monotonic()) - told_at > TELL_EVERY_S or done == len(rows):
            progress(done, len(rows))
            told_at = now


def _measured(store: Store, file: str) -> WH | Unreadable:
    try:
        return store.measure(file)
    except Unreadable as error:
        return error
    except OSError as error:
        return Unreadable(CANNOT_OPEN, error.strerror or str(error))


def _captions(store: Store, beside: Sequence[str], old: Manifest, rows: Ints, sizes: Ints) -> Texts:
    """What the caption files say: as row `rows` of the old manifest, or where that is -1, as the file, if there is one.

    One too large to be a caption says nothing.
    One that cannot be opened counts as missing: its size becomes UNKNOWN, so that the next start tries it again.
    """
    is_read = (rows < 0) & (sizes > UNKNOWN) & (sizes <= LARGEST_TEXT_BYTES)
    fresh = np.flatnonzero(is_read).tolist()
    texts = in_order(partial(_text, store), (beside[row] for row in fresh), store.in_flight)
    captions = ["" if row < 0 else old.captions.at(row) for row in rows.tolist()]
    for row, text in zip(fresh, texts, strict=True):
        if text is None:
            sizes[row] = UNKNOWN
        else:
            captions[row] = text
    return Texts.of(captions)


def _text(store: Store, file: str) -> str | None:
    """What a caption file says, None if it cannot be opened."""
    try:
        return (decode(store.read(file)) or "").strip()
    except (Unreadable, OSError):
        return None
