"""What trains with what: every family, adapter, base, optimiser and precision, and the reasons where some do not go together.

One list serves three readers: the rules refuse by it, the tests train by it, and `docs/support.md` is printed from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Any, get_args

from simpletuner.config import rules, rules_memory
from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.compose import compose
from simpletuner.config.layers import Given
from simpletuner.config.run import Hardware, Run
from simpletuner.config.sections.precision import Stored
from simpletuner.config.vocabulary import FamilyFacts
from simpletuner.errors import Problem

__all__ = ["ADAPTERS", "BASES", "FORMATS", "Cell", "cells", "cover", "refusals", "run_of"]

ADAPTERS: dict[str, Mapping[str, Any]] = {
    "lora": {"lora_type": "standard"},
    "dora": {"lora_type": "standard", "use_dora": True},
    "lokr": {"lora_type": "lycoris"},
    "full": {"model_type": "full"},
}
"""What can be trained, and the options that say so."""

BASES = get_args(Stored)
FORMATS = ("no", "bf16", "fp16")

Families = Mapping[str, FamilyFacts]


@dataclass(frozen=True, order=True)
class Cell:
    """One way to train."""

    family: str
    adapter: str
    base: str
    """`base_model_precision`."""
    mixed: str
    """`mixed_precision`."""
    optimizer: str

    @property
    def options(self) -> dict[str, Any]:
        """The options that ask for it, the family apart."""
        named = {"base_model_precision": self.base, "mixed_precision": self.mixed, "optimizer": self.optimizer}
        return {**named, **ADAPTERS[self.adapter]}

    @cached_property
    def pairs(self) -> frozenset[tuple[Any, ...]]:
        """Every two of its values, with their places."""
        return frozenset(combinations(enumerate(astuple(self)), 2))

    def __str__(self) -> str:
        return "-".join(astuple(self))


def cells(families: Families, hardware: Hardware) -> list[Cell]:
    """All that go together. What refuses an optimiser does not look at the other values, nor they at it."""
    found = []
    for name, family in families.items():
        optimizers = [each for each in OPTIMIZERS if not refusals(family, name, {"optimizer": each}, hardware)]
        for adapter, base, mixed in product(ADAPTERS, BASES, FORMATS):
            options = {"base_model_precision": base, "mixed_precision": mixed, **ADAPTERS[adapter]}
            if not refusals(family, name, options, hardware):
                found += [Cell(name, adapter, base, mixed, optimizer) for optimizer in optimizers]
    return found


def run_of(family: FamilyFacts, name: str, options: Mapping[str, Any], hardware: Hardware) -> Run:
    """A run of these options, defaults derived as ever; it has no datasets."""
    given = {key: Given(value, "support", value) for key, value in {"model_family": name, **options}.items()}
    return compose(family, given, (), hardware, None, ())


def refusals(family: FamilyFacts, name: str, options: Mapping[str, Any], hardware: Hardware) -> list[Problem]:
    """Why these options do not go together on this hardware; none if they do."""
    run = run_of(family, name, options, hardware)
    checks = (rules.check(run), rules.check_adapter(run, family), rules_memory.check_hardware(run), family.check(run))
    return [problem for problems in checks for problem in problems if problem.option != "data_backend_config"]


def cover(wanted: Sequence[Cell]) -> list[Cell]:
    """A few of these cells in which every two values that go together somewhere do so at least once."""
    missing = set().union(*(cell.pairs for cell in wanted))
    chosen = []
    while missing:
        best = max(wanted, key=lambda cell: len(cell.pairs & missing))
        chosen.append(best)
        missing -= best.pairs
    return chosen
