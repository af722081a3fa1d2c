"""Where the datasets are described."""

from __future__ import annotations

from typing import Any

from simpletuner.config.options import Section, option

__all__ = ["Data"]


class Data(Section):
    """Where the datasets are described. Keys of a dataset written in the main config are the default of every dataset."""

    data_backend_config: str | tuple[dict[str, Any], ...] | None = option(None, level="essential", path="input")
    """The JSON file that lists the datasets, or the list itself. Unset: `multidatabackend.json` beside the config file."""
