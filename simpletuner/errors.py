"""The exception tree. Every error a user can meet says what happened, why, and how to mend it.

Standard library only. Exit codes: 2 what is found before any work, 1 a failure afterwards, 130 / 143 interrupted and saved.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

__all__ = [
    "ConfigError",
    "DataError",
    "Interrupted",
    "ManyProblems",
    "Problem",
    "RunError",
    "SimpletunerError",
    "UserError",
    "missing",
    "require",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user asked for.

    `option` is the name as the user writes it (or "" when no single option is at fault). An `overridable` problem
    becomes a warning under `i_know_what_i_am_doing`.
    """

    option: str
    what: str
    why: str = ""
    mend: str = ""
    overridable: bool = False

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"Why:  {self.why}")
        if self.mend:
            lines.append(f"Mend: {self.mend}")
        return "\n".join(lines)


class SimpletunerError(Exception):
    """The root: whatever we raise for users to read."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", mend: str = "") -> None:
        self.problem = Problem("", what, why, mend)
        self.problems: tuple[Problem, ...] = (self.problem,)
        """All that is wrong, for who counts them."""
        super().__init__(str(self.problem))


class UserError(SimpletunerError, ValueError):
    """Found before any work: nothing was computed, nothing was lost."""

    exit_code = 2


class ManyProblems(UserError):
    """What is wrong, all of it at once."""

    where = ""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, f"{type(self).__name__} needs at least one problem"
        count = len(self.problems)
        head = f"{count} problem{'' if count == 1 else 's'}{self.where}:"
        Exception.__init__(self, "\n\n".join([head, *map(str, self.problems)]))
        self.problem = self.problems[0]


class ConfigError(ManyProblems):
    """What is wrong with the configuration."""

    where = " in the configuration"


class DataError(UserError):
    """A dataset that cannot be trained as it stands (no usable picture, captions missing, ...)."""


class RunError(SimpletunerError):
    """A run that had begun and cannot go on."""


class Interrupted(SimpletunerError):
    """Stopped by the user; what was done is saved. `signal_number` 2 gives exit code 130, 15 gives 143."""

    def __init__(self, signal_number: int, what: str, mend: str = "") -> None:
        super().__init__(what, mend=mend)
        self.exit_code = 128 + signal_number


NOT_CORE = "it is not part of the core install."


def require(module: str, *, option: str, extra: str) -> ModuleType:
    """Import an optional library, or say which option wants it and the pip line that brings it. Raises UserError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"`{option}` needs the package `{module}`, which cannot be imported ({error}).",
            why=NOT_CORE,
            mend=_pip_line(extra),
        ) from error


def missing(module: str, *, option: str, extra: str = "", pip: str = "") -> Problem | None:
    """The problem that an optional library is not installed, for check time: it is looked for, not imported.

    `option` as for `require`: "name" or "name=value". What no extra brings says `pip`, the line that does.
    (The parents of a dotted `module` are imported.)
    """
    parent = module.rpartition(".")[0]
    if (not parent or importlib.util.find_spec(parent)) and importlib.util.find_spec(module):
        return None
    what = f"`{option}` needs the package `{module}`, which is not installed."
    return Problem(option.partition("=")[0], what, NOT_CORE, pip or _pip_line(extra))


def _pip_line(extra: str) -> str:
    return f"pip install 'simpletuner[{extra}]' (from a clone: pip install -e '.[{extra}]')"
