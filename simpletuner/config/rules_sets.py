"""What there is to say of the options of the eval loss where there is no set to judge by."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.run import Run
from simpletuner.config.sections import EvalLoss

__all__ = ["notices"]

DEFAULTS = ("core", "family", "flavour", "derived")


def notices(run: Run) -> Iterator[str]:
    """A line for each option that the user wrote in vain."""
    if not run.eval_datasets:
        for name in EvalLoss.model_fields:
            if run.sources[name] not in DEFAULTS:
                yield f"`{name}` has no effect here: there is no dataset of the dataset_type `eval`."
