"""The store that a dataset's entry asks for."""

from __future__ import annotations

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.stores.base import Store
from simpletuner.data.stores.folder import Folder

__all__ = ["store_of"]


def store_of(entry: ImageDataset) -> Store:
    """Where the pictures of this set are kept. Nothing is opened yet."""
    return Folder(entry.instance_data_dir)
