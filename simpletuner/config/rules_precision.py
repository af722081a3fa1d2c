"""What is wrong between number formats, the hardware and what is trained: pure functions `Run` -> problems."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.catalogue import PRECISIONS
from simpletuner.config.run import Run
from simpletuner.errors import Problem, missing

__all__ = ["check_precision"]


def check_precision(run: Run) -> Iterator[Problem]:
    """Formats of frozen weights that cannot be had here, or not for this kind of training."""
    for option, value in run.precision:
        if option.endswith("_precision") and value in PRECISIONS:
            yield from _stored(option, value, run)
    stored = run.precision.base_model_precision
    if run.model.model_type == "full" and stored != "no_change":
        yield Problem(
            "base_model_precision",
            f'`base_model_precision` is "{stored}", but `model_type` is "full".',
            "full tuning moves every weight a little at each step, and steps that small are lost between so few values.",
            'Set `model_type` to "lora", with `lora_type` "standard" or "lycoris"; or `base_model_precision` to "no_change".',
        )


def _stored(option: str, value: str, run: Run) -> Iterator[Problem]:
    row, device = PRECISIONS[value], run.hardware.device
    if device in row.not_on:
        instead = " or ".join(f'"{name}"' for name in row.instead)
        yield Problem(option, f'`{option}` "{value}" does not work on {device}.', row.not_on[device], f"Set it to {instead}.")
        return
    if problem := missing(row.module, option=f"{option}={value}", extra=row.extra):
        yield problem
