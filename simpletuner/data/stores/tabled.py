"""A store with a table beside it: which of its pictures are meant, and what is known of them without opening any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from simpletuner.data.geometry import WH
from simpletuner.data.manifest import UNKNOWN, Ints, Texts
from simpletuner.data.stores.base import Listing, Store
from simpletuner.data.stores.tables import Columns, Table, given_back, read_table
from simpletuner.events import Notice, Tell

__all__ = ["NOT_IN_TABLE", "Tabled"]

NOT_IN_TABLE = "not in the table"
NAMED = 10
"""Files named in one line."""
NOTED = 1000
"""Files noted in the ledger; a table may hold millions of which this folder is a part."""


class Tabled:
    """`store`, with what a table says of it."""

    def __init__(self, store: Store, parquet: Mapping[str, Any], *, dataset: str, with_captions: bool) -> None:
        self._store = store
        self._dataset = dataset
        self._path = Path(parquet["path"]).expanduser()
        self._with_endings = parquet.get("identifier_includes_extension", False)
        caption, fallback, width, height = (
            parquet.get(f"{name}_column", "") for name in ("caption", "fallback_caption", "width", "height")
        )
        if not with_captions:
            caption = fallback = ""
        self._columns = Columns(parquet["filename_column"], caption, fallback, width, height)
        self.root, self.key, self.in_flight = store.root, store.key, store.in_flight
        self.captions_from = f"{self._path.absolute()}: {' or '.join(filter(None, (caption, fallback)))}" if caption else ""

    def listing(self, tell: Tell) -> Listing:
        """What is in the store, with what the table knows of it. Raises DataError if the table is no use."""
        listing = self._store.listing(tell)
        if "" in listing.closed or not listing.files:
            return listing
        keys = Texts.of(listing.files if self._with_endings else (file.rpartition(".")[0] for file in listing.files))
        with given_back():
            table = read_table(self._path, self._columns, dataset=self._dataset)
            joined = _joined(listing, table, table.rows_of(keys), self._path.name)
            absent, count = table.absent(keys, NOTED)
            del table
        joined.notes = dict.fromkeys(absent, f"named by {self._path.name}, but not there")
        if count:
            more = f" and {count - NAMED:,} more" if count > NAMED else ""
            what = f"{count:,} pictures that {self._path.name} names are not in {self.root}"
            tell(Notice(f"{self._dataset}: {what}: {', '.join(absent[:NAMED])}{more}", "warning"))
        return joined

    def measure(self, file: str) -> WH:
        """From the header of a file."""
        return self._store.measure(file)

    def read(self, file: str) -> bytes:
        """All of a file."""
        return self._store.read(file)


def _joined(listing: Listing, table: Table, rows: Ints, name: str) -> Listing:
    """The listing with the columns of the table called `name`: file i is its row `rows[i]`, in no row if that is -1."""
    edges = table.edges_at(rows)
    times = listing.times
    if edges is not None:
        # A size that the table says anew is as good as a changed file: what was measured or found wrong before is void.
        widths, heights = edges.astype(np.int64).T
        times = times ^ (widths * 0x9E3779B1 + heights * 0x85EBCA6B)
    return replace(
        listing,
        sizes=np.where(rows < 0, UNKNOWN, listing.sizes),
        times=times,
        captions=table.captions_at(rows),
        edges=edges,
        faults=dict.fromkeys(np.flatnonzero(rows < 0).tolist(), (NOT_IN_TABLE, f"{name} does not name it")),
    )
