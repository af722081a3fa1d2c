"""What trains with what: every adapter, number format and optimiser, and the reasons where two do not go together.

One list serves three readers: the rules refuse by it, the tests train by it, and `docs/support.md` is printed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, get_args

from simpletuner.config import rules
from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.compose import compose
from simpletuner.config.layers import Given
from simpletuner.config.run import Hardware, Run
from simpletuner.config.sections.precision import Stored
from simpletuner.config.vocabulary import FamilyFacts
from simpletuner.errors import Problem

__all__ = ["ADAPTERS", "Cell", "cells", "cover", "refusals", "run_of"]

ADAPTERS: dict[str, Mapping[str, Any]] = {
    "lora": {"lora_type": "standard"},
    "dora": {"lora_type": "standard", "use_dora": True},
    "lokr": {"lora_type": "lycoris"},
    "full": {"model_type": "full"},
}
"""What can be trained, and the options that say so."""

FORMATS = ("no", "bf16", "fp16")


@dataclass(frozen=True, order=True)
class Cell:
    """One way to train a family."""

    adapter: str
    base: str
    """`base_model_precision`."""
    optimizer: str
    mixed: str
    """`mixed_precision`."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that ask for it."""
        named = {"base_model_precision": self.base, "optimizer": self.optimizer, "mixed_precision": self.mixed}
        return {**named, **ADAPTERS[self.adapter]}

    @property
    def pairs(self) -> set[tuple[tuple[int, str], tuple[int, str]]]:
        """Every two of its values, with their places."""
        values = (self.adapter, self.base, self.optimizer, self.mixed)
        return set(combinations(enumerate(values), 2))

    def __str__(self) -> str:
        return f"{self.adapter}-{self.base}-{self.optimizer}-{self.mixed}"


def cells() -> list[Cell]:
    """Every combination, the refused ones too."""
    return [Cell(*values) for values in product(ADAPTERS, get_args(Stored), OPTIMIZERS, FORMATS)]


def run_of(family: FamilyFacts, name: str, options: Mapping[str, Any], hardware: Hardware) -> Run:
    """A run of these options, defaults derived as ever; it has no datasets."""
    given = {key: Given(value, "support", value) for key, value in {"model_family": name, **options}.items()}
    return compose(family, given, (), hardware, None, ())


def refusals(family: FamilyFacts, name: str, options: Mapping[str, Any], hardware: Hardware) -> list[Problem]:
    """Why these options do not go together on this hardware; none if they do."""
    run = run_of(family, name, options, hardware)
    found = [*rules.check(run), *rules.check_adapter(run, family), *family.check(run)]
    return [problem for problem in found if problem.option != "data_backend_config"]


def cover(wanted: list[Cell]) -> list[Cell]:
    """A few of these cells in which every two values that go together somewhere do so at least once."""
    missing = set().union(*(cell.pairs for cell in wanted))
    chosen = []
    candidates = sorted(wanted, key=str)
    while missing:
        best = max(candidates, key=lambda cell: len(cell.pairs & missing))
        chosen.append(best)
        missing -= best.pairs
    return chosen
