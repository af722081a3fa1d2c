"""What there is to say of options that wait for a kind of dataset which the run has none of."""

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
    is_masked = any(dataset.conditioning_data for dataset in run.datasets)
    if not is_masked and run.sources["masked_loss_probability"] not in DEFAULTS:
        yield "`masked_loss_probability` has no effect here: no set to train on has `conditioning_data`."
