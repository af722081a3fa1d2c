"""A dataset of the `datasets` library as a store: its pictures are its rows, as the bytes they were made of."""

from __future__ import annotations

import io
import os
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.captions import wants_column
from simpletuner.data.geometry import WH
from simpletuner.data.pixels import Unreadable, measure
from simpletuner.data.stores.base import Listing
from simpletuner.data.stores.tables import captions_column, check_columns, texts_of
from simpletuner.errors import DataError
from simpletuner.events import Tell

__all__ = ["Rows"]

SAVED = ("dataset_info.json", "dataset_dict.json")
"""What a folder that `save_to_disk` made holds."""
TROUBLE = (OSError, ValueError, TypeError, LookupError, RuntimeError)
"""What Arrow raises, and `datasets` beside its own errors, where a dataset is damaged, empty or of another make."""
UNSET_SPLIT = ImageDataset.model_fields["split"].default
AT_ONCE = 1000
"""Rows whose names are looked at together."""


class Rows:
    """Pictures in a column; a row is called by its number and, where it has one, its file's name: `00000007/fox.jpg`."""

    key = "dataset_name"
    in_flight = 1

    def __init__(self, entry: ImageDataset) -> None:
        assert entry.dataset_name is not None, "config/rules_stores.py refuses a set without it"
        path = Path(entry.dataset_name).expanduser()
        self._name = str(path.resolve()) if path.is_dir() else entry.dataset_name
        self._dataset, self._split, self._revision = entry.id, entry.split, entry.revision
        self._column = entry.image_column
        self._caption = entry.caption_column if wants_column(entry) else ""
        self.root = f"{self._name} ({', '.join(filter(None, (self._split, self._revision)))})"
        self.captions_from = f"{self.root}: {self._caption}" if self._caption else ""
        self._opened: Any = None
        self._pictures: Any = None
        self._lock = Lock()

    def listing(self, tell: Tell) -> Listing:
        """All rows. What tells whether they have changed is the files that the dataset lies in, all rows together."""
        rows = self._rows()
        files = [f"{row:08}/{name}" for row, name in enumerate(_names(rows, self._column))]
        stamp = np.full(len(files), _number(rows), np.int64)
        return Listing(files, np.zeros(len(files), np.int64), stamp, captions=self._captions(rows) if self._caption else None)

    def measure(self, file: str) -> WH:
        """From the header of a row's picture."""
        return measure(io.BytesIO(self.read(file)))

    def read(self, file: str) -> bytes:
        """The bytes of a row's picture, undecoded."""
        self._rows()
        cell = self._pictures[int(file.partition("/")[0])][self._column]
        if cell is None:
            raise Unreadable("empty row", f"its {self._column} is null")
        if cell["bytes"] is None:
            with open(cell["path"], "rb") as opened:
                return opened.read()
        return cell["bytes"]

    def _captions(self, rows: Any) -> Any:
        import pyarrow as pa

        table = rows.select_columns([self._caption]).with_format("arrow")[:]
        try:
            return texts_of(captions_column(table[self._caption]))
        except pa.ArrowException as error:
            what = f"Dataset `{self._dataset}`: the column `{self._caption}` of {self.root} holds no text: {error}."
            raise DataError(what, mend="correct `caption_column`.") from error

    def _rows(self) -> Any:
        """The dataset, opened at the first call. Raises DataError."""
        with self._lock:
            if self._opened is None:
                rows = self._loaded()
                columns = {"image_column": self._column, "caption_column": self._caption}
                check_columns(rows.column_names, columns, f"Dataset `{self._dataset}`: {self.root}")
                try:
                    self._opened = rows.cast_column(self._column, _undecoded())
                except TROUBLE as error:
                    what = f"Dataset `{self._dataset}`: the column `{self._column}` of {self.root} holds no pictures: {error}."
                    raise DataError(what, mend="correct `image_column`.") from error
                self._pictures = self._opened.select_columns([self._column])
            return self._opened

    def _loaded(self) -> Any:
        import datasets

        label = f"Dataset `{self._dataset}`: {self._name}"
        try:
            if not any((Path(self._name) / name).is_file() for name in SAVED):
                return datasets.load_dataset(self._name, split=self._split, revision=self._revision)
            saved = datasets.load_from_disk(self._name)
        except (*TROUBLE, datasets.exceptions.DatasetsError) as error:
            mend = "correct `dataset_name`, `split` or `revision`; a gated dataset needs `huggingface-cli login`."
            raise DataError(f"{label} cannot be opened: {error}", mend=mend) from error
        if not isinstance(saved, datasets.DatasetDict):
            if self._split not in (UNSET_SPLIT, str(saved.split)):
                why = "it was saved as a dataset, not as a dictionary of splits."
                raise DataError(f"{label} has no split `{self._split}`.", why, "remove `split`.")
            return saved
        if self._split not in saved:
            raise DataError(f"{label} has no split `{self._split}`.", f"its splits: {', '.join(saved)}.", "correct `split`.")
        return saved[self._split]


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)  # decoding is `pixels.py`'s, so that every store gives the same pixels


def _names(rows: Any, column: str) -> list[str]:
    """The file's name of each row's picture, "" where it has none. The bytes are not touched."""
    names: list[str] = []
    for batch in rows.select_columns([column]).with_format("arrow").iter(AT_ONCE):
        for chunk in batch[column].chunks:
            names += [os.path.basename(path or "") for path in chunk.field("path").to_pylist()]
    return names


def _number(rows: Any) -> int:
    """A number that changes with the files that the rows lie in."""
    facts = [(file["filename"], os.stat(file["filename"])) for file in rows.cache_files]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
