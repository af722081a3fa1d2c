"""The store that a dataset's entry asks for."""

from __future__ import annotations

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.captions import wants_column
from simpletuner.data.stores.base import Store
from simpletuner.data.stores.bucket import Bucket
from simpletuner.data.stores.folder import Folder
from simpletuner.data.stores.rows import Rows
from simpletuner.data.stores.tabled import Tabled
from simpletuner.data.stores.urls import Urls

__all__ = ["store_of"]


def store_of(entry: ImageDataset) -> Store:
    """Where the pictures of this set are kept, and the table that tells of them. Nothing is opened yet."""
    store = _kept(entry)
    if entry.metadata_backend == "discovery":
        return store
    return Tabled(store, entry.parquet, dataset=entry.id, with_captions=wants_column(entry))


def _kept(entry: ImageDataset) -> Store:
    if entry.type == "aws":
        return Bucket(entry)
    if entry.type == "csv":
        return Urls(entry)
    if entry.type == "huggingface":
        return Rows(entry)
    assert entry.instance_data_dir is not None, "config/rules_stores.py refuses a local set without a folder"
    return Folder(entry.instance_data_dir)
