"""Where the datasets are described."""

from __future__ import annotations

from typing import Any, Literal

from simpletuner.config.options import Section, option

__all__ = ["Data"]


class Data(Section):
    """Where the datasets are described. Keys of a dataset written in the main config are the default of every dataset."""

    data_backend_config: str | tuple[dict[str, Any], ...] | None = option(None, level="essential", path="input")
    """The JSON file that lists the datasets, or the list itself. Unset: `multidatabackend.json` beside the config file."""

    data_backend_sampling: Literal["auto-weighting", "uniform"] = option("auto-weighting")
    """How draws weigh the datasets, beside their `probability`: by their share of the micro-batches, so that all last as long,
    or all alike, so that small ones are through early in the epoch."""
