"""The families of text-to-image models: one file each, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABCMeta

from simpletuner.config.run import Run
from simpletuner.families.base import ModelFamily

__all__ = ["find", "load"]

NOT_FAMILIES = (
    "base",
    "cascade_images",
    "cascade_lora",
    "cascade_options",
    "cascade_parts",
    "cascade_pictures",
    "cascade_rules",
    "common",
    "downloads",
    "hollow",
    "instruction",
    "repository",
    "sana_encoders",
    "sd3_encoders",
    "sd3_previews",
    "sd3_rules",
    "sd3_transformer",
)


def find() -> dict[str, type[ModelFamily]]:
    """`model_family` -> its class, by the names of the files here. Imports no torch."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_FAMILIES)
    return {name: the_family_in(f"{__name__}.{name}") for name in names}


def load(run: Run) -> ModelFamily:
    """The family that the run trains. No weights are loaded."""
    return find()[run.model.model_family](run)


def the_family_in(module_name: str) -> type[ModelFamily]:
    module = importlib.import_module(module_name)
    [family] = [
        value
        for value in vars(module).values()
        # By its exact metaclass: on Python 3.10 `dict[str, int]` passes for a class.
        if type(value) is ABCMeta and issubclass(value, ModelFamily) and value.__module__ == module_name
    ]
    return family
