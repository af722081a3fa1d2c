"""What a Parquet or JSON Lines table says of pictures: names, captions and sizes as columns, never as a Python object a row.

Only the columns that are asked for are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.config.spelling import nearest
from simpletuner.data.captions import APART
from simpletuner.data.manifest import Ints, Texts
from simpletuner.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "Table", "captions_column", "check_columns", "given_back", "read_table", "texts_of"]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say what; "" for what no column says."""

    name: str
    caption: str = ""
    fallback_caption: str = ""
    width: str = ""
    height: str = ""

    @property
    def by_option(self) -> dict[str, str]:
        """Their names, by the options that give them."""
        named = (self.name, self.caption, self.fallback_caption, self.width, self.height)
        options = ("filename", "caption", "fallback_caption", "width", "height")
        return {f"{option}_column": name for option, name in zip(options, named, strict=True)}

    @property
    def wanted(self) -> list[str]:
        """The names of those that are to be read."""
        return list(dict.fromkeys(name for name in self.by_option.values() if name))


@dataclass(frozen=True)
class Table:
    """Columns of equal length."""

    names: pa.LargeBinaryArray
    captions: pa.LargeStringArray | None
    """Alternatives apart by `captions.APART`; null where there is none. None: no column says them."""
    edges: NDArray[np.int32] | None
    """(N, 2): width and height; zeros where they are unknown. None: no columns say them."""

    def __len__(self) -> int:
        return len(self.names)

    def rows_of(self, keys: Texts) -> Ints:
        """For each key the first row of that name, -1 if there is none."""
        import pyarrow.compute as pc

        found = pc.index_in(_arrow(keys), value_set=self.names)
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def absent(self, keys: Texts, most: int) -> tuple[list[str], int]:
        """Names that are none of the keys: up to `most` of them, and how many there are."""
        import pyarrow.compute as pc

        is_absent = pc.and_(pc.not_equal(self.names, b""), pc.invert(pc.is_in(self.names, value_set=_arrow(keys))))
        absent = self.names.filter(is_absent)
        return [name.as_py().decode("utf-8", "replace") for name in absent[:most]], len(absent)

    def captions_at(self, rows: Ints) -> Texts | None:
        """The captions of these rows; "" where a row is -1 or has none."""
        if self.captions is None:
            return None
        return texts_of(self.captions, rows)

    def edges_at(self, rows: Ints) -> NDArray[np.int32] | None:
        """(N, 2): the sizes of these rows; zeros where a row is -1 or does not say."""
        if self.edges is None:
            return None
        return np.where(rows[:, None] >= 0, self.edges[rows], 0).astype(np.int32)


def _arrow(texts: Texts) -> pa.LargeBinaryArray:
    import pyarrow as pa

    buffers = [None, pa.py_buffer(texts.offsets), pa.py_buffer(texts.blob)]
    return pa.Array.from_buffers(pa.large_binary(), len(texts.offsets) - 1, buffers)


def texts_of(strings: pa.LargeStringArray, rows: Ints | None = None) -> Texts:
    """Arrow's strings, or those of these rows, as a column of ours; "" for null and for row -1."""
    import pyarrow as pa

    if rows is not None:
        strings = strings.take(pa.array(rows, mask=rows < 0))
    strings = pa.concat_arrays([strings.fill_null("")])  # its offsets begin at zero
    _, offsets, blob = strings.buffers()
    count = len(strings)
    ends = np.zeros(1, np.int64) if count == 0 else np.frombuffer(offsets, np.int64)[: count + 1]
    letters = np.frombuffer(blob, np.uint8)[: ends[-1]] if blob else np.zeros(0, np.uint8)
    return Texts(letters.copy(), ends.copy())  # not Arrow's own memory: that is given back


@contextmanager
def given_back() -> Iterator[None]:
    """After the block, memory that Arrow keeps for its next table goes back: 300 bytes for each row that was read."""
    import pyarrow as pa

    try:
        yield
    finally:
        pa.default_memory_pool().release_unused()


def read_table(path: Path, columns: Columns, *, dataset: str) -> Table:
    """The wanted columns of a .parquet or .jsonl file, or of a folder of .parquet files.

    Raises DataError, which names the `dataset`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    label = f"Dataset `{dataset}`: the table {path}"
    try:
        table = _opened(path, columns, label)
        if not len(table):
            raise DataError(f"{label} has no row.", mend="correct `path` of `parquet`.")
        names = text_column(table[columns.name]).fill_null("").cast(pa.large_binary())
        captions = None
        if columns.caption:
            captions = captions_column(table[columns.caption])
            if columns.fallback_caption:
                captions = pc.coalesce(captions, captions_column(table[columns.fallback_caption]))
        edges = None
        if columns.width:
            edges = np.stack([_edge(table[name]) for name in (columns.width, columns.height)], axis=1)
        return Table(names, captions, edges)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{label} cannot be read: {error}.", mend="correct `path` or the columns of `parquet`.") from error


def _opened(path: Path, columns: Columns, label: str) -> pa.Table:
    """The wanted columns as they are stored."""
    import pyarrow as pa
    import pyarrow.dataset

    if path.suffix.lower() in (".jsonl", ".json"):
        import pyarrow.json

        with pa.json.open_json(path) as reader:
            schema = reader.schema
        check_columns(schema.names, columns.by_option, label)
        types = {name: schema.field(name).type for name in columns.wanted}
        # A column may say nothing in the block that its type is guessed from, and something later: then it is text.
        wanted = pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in types.items()])
        options = pa.json.ParseOptions(explicit_schema=wanted, unexpected_field_behavior="ignore")
        return pa.json.read_json(path, parse_options=options)
    stored = pa.dataset.dataset(path, format="parquet")
    check_columns(stored.schema.names, columns.by_option, label)
    return stored.to_table(columns=columns.wanted)


def check_columns(there: Sequence[str], wanted: Mapping[str, str], label: str) -> None:
    """Raise DataError for every wanted column that is not there, at once. `wanted`: the option that names it -> its name."""
    absent = {option: name for option, name in wanted.items() if name and name not in there}
    if not absent:
        return
    listed = " and ".join(f"`{name}` ({option})" for option, name in absent.items())
    near = [f'"{option}": "{found}"' for option, name in absent.items() if (found := nearest(name, there))]
    mend = f"perhaps {', '.join(near)}." if near else f"set {' and '.join(absent)} to one of these."
    raise DataError(f"{label} has no column {listed}.", f"its columns: {', '.join(there) or 'none'}.", mend)


def text_column(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Text, or numbers, as text, in one piece. Raises ArrowInvalid (or kin) for what is neither."""
    import pyarrow as pa

    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.large_string())
    return _whole(column.cast(pa.large_string()))


def captions_column(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """Captions, of which each row has one, or a list of alternatives; null where nothing is said. Raises as `text_column`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lists = _whole(column.cast(pa.large_list(pa.large_string())))
        words = lists.flatten().fill_null("")
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        texts = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(ends), words), pa.scalar(APART, pa.large_string()))
    else:
        texts = text_column(column)
    texts = pc.utf8_trim(texts, f" \t\r\n{APART}")
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)


def _whole(column: pa.ChunkedArray) -> Any:
    import pyarrow as pa

    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _edge(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """Pixels; 0 for what is null, or no size."""
    import pyarrow as pa

    pixels = column.cast(pa.float64()).fill_null(0).to_numpy()
    return np.where(np.isfinite(pixels) & (pixels > 0) & (pixels < 2**31), pixels, 0).astype(np.int32)
