"""A CSV of URLs as a store: its pictures are downloaded into a folder of ours, once, and read from there."""

from __future__ import annotations

import csv
import os
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.cache import NO_RIGHT
from simpletuner.data.captions import wants_column
from simpletuner.data.geometry import WH
from simpletuner.data.manifest import Texts
from simpletuner.data.pixels import measure
from simpletuner.data.stores.base import ENDINGS, NO_FILE, Listing, Stamp, in_order
from simpletuner.data.stores.download import Dead, Downloader
from simpletuner.data.stores.tables import check_columns
from simpletuner.data.whole import remove_leftovers, write_pieces
from simpletuner.errors import DataError, RunError
from simpletuner.events import Progress, Tell

__all__ = ["DEAD", "Urls"]

DEAD = "cannot be downloaded"
IN_FLIGHT = 16
"""Downloads under way at once."""


class Urls:
    """Pictures on the web, each named by its URL."""

    key = "csv_file"
    in_flight = 1

    def __init__(self, entry: ImageDataset, downloader: Downloader | None = None) -> None:
        assert entry.csv_file is not None, "config/rules_stores.py refuses a set without it"
        assert entry.csv_cache_dir is not None, "config/derive.py gives every set one"
        self._dataset = entry.id
        self._table = Path(entry.csv_file)
        self._folder = Path(entry.csv_cache_dir)
        self._column = entry.csv_url_column
        self._caption = entry.csv_caption_column if wants_column(entry) else ""
        self._downloader = downloader or Downloader(allow_private=entry.csv_allow_private_addresses)
        self.root = str(self._table.resolve())
        self.captions_from = f"{self.root}: {self._caption}" if self._caption else ""

    def listing(self, tell: Tell) -> Listing:
        """All URLs, after those not there yet were downloaded: what could not be is a fault, and is tried at the next start."""
        urls, captions, twice = self._rows()
        there = self._there()
        stamps = [there.get(_name(url), NO_FILE) for url in urls]
        fresh = [row for row, stamp in enumerate(stamps) if stamp is NO_FILE]
        faults: dict[int, tuple[str, str]] = {}
        loaded = in_order(self._loaded, (urls[row] for row in fresh), IN_FLIGHT)
        try:
            for done, (row, result) in enumerate(zip(fresh, loaded, strict=True), 1):
                if isinstance(result, Dead):
                    faults[row] = (DEAD, str(result))
                else:
                    stamps[row] = result
                tell(Progress(f"{self._dataset}: downloading", done, len(fresh), "pictures"))
        except BaseException:
            self._downloader.give_up()
            raise
        stamps_N2 = np.array(stamps, np.int64).reshape(-1, 2)
        notes = {url: f"stands {count} times in {self._table.name}, and counts once" for url, count in twice.items()}
        texts = Texts.of(captions) if self._caption else None
        return Listing(urls, stamps_N2[:, 0], stamps_N2[:, 1], captions=texts, faults=faults, notes=notes)

    def measure(self, file: str) -> WH:
        """From the header of a downloaded picture."""
        return measure(self._path(file))

    def read(self, file: str) -> bytes:
        """All of a downloaded picture."""
        return self._path(file).read_bytes()

    def _rows(self) -> tuple[list[str], list[str], dict[str, int]]:
        """Each URL once, in the order of the file; its caption, the first; and which stand there more than once."""
        label = f"Dataset `{self._dataset}`: {self._table}"
        columns = {"csv_url_column": self._column, "csv_caption_column": self._caption}
        captions: dict[str, str] = {}
        counts: Counter[str] = Counter()
        try:
            with self._table.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                names = list(rows.fieldnames or ())
                if len(names) == 1 and (marks := set(names[0]) & set(";\t|")):
                    why = f"its first line is {names[0]!r}: columns that stand apart by {marks.pop()!r}."
                    raise DataError(f"{label} has one column.", why, "save it with commas between the columns.")
                check_columns(names, columns, label)
                for row in rows:
                    if url := (row[self._column] or "").strip():
                        counts[url] += 1
                        captions.setdefault(url, (row[self._caption] or "").strip() if self._caption else "")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            why = "a CSV is text in UTF-8, with the names of its columns in the first line."
            raise DataError(f"{label} cannot be read: {error}.", why, "correct `csv_file`, or the file.") from error
        if not captions:
            raise DataError(f"{label} holds no URL in the column `{self._column}`.", mend="correct `csv_file`, or the file.")
        return list(captions), list(captions.values()), {url: count for url, count in counts.items() if count > 1}

    def _there(self) -> dict[str, Stamp]:
        """What has been downloaded, by its name in the folder."""
        there = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for part in self._folder.iterdir():
                if part.is_dir():
                    remove_leftovers(part)
                    with os.scandir(part) as entries:
                        for entry in entries:
                            facts = entry.stat()
                            there[f"{part.name}/{entry.name}"] = Stamp(facts.st_size, facts.st_mtime_ns)
        except OSError as error:
            raise DataError(
                f"Dataset `{self._dataset}`: {self._folder}, where its pictures are downloaded to, cannot be used: {error}.",
                mend="make it a folder of yours, or set csv_cache_dir to another.",
            ) from error
        return there

    def _loaded(self, url: str) -> Stamp | Dead:
        """Download one picture, and hand back its stamp. Raises DataError or RunError if it cannot be kept."""
        try:
            raw = self._downloader.fetch(url)
        except Dead as error:
            return error
        path = self._path(url)
        try:
            path.parent.mkdir(exist_ok=True)
            write_pieces(path, [raw])
            facts = path.stat()
        except OSError as error:
            no_right = error.errno in NO_RIGHT
            what = f"Dataset `{self._dataset}`: {path} cannot be written: {error.strerror or error}."
            mend = f"{'make the folder writable' if no_right else 'free space there'}, or set csv_cache_dir to another folder."
            raise (DataError if no_right else RunError)(what, mend=mend) from error
        return Stamp(facts.st_size, facts.st_mtime_ns)

    def _path(self, url: str) -> Path:
        return self._folder / _name(url)


def _name(url: str) -> str:
    """Where a picture lies within the folder: by a hash, in one of 256 parts, with the ending that its URL has."""
    digest = blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    try:
        _, dot, ending = urlsplit(url).path.rpartition(".")
    except ValueError:  # no URL: the downloader says so
        dot = ending = ""
    ending = dot + ending.lower()
    return f"{digest[:2]}/{digest[2:]}{ending if ending in ENDINGS else ''}"
