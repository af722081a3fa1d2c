"""What one key of `optimizer_config` may be, in words and as a test: the kinds that the catalogue's rows name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "FACTOR",
    "INNER_RATES",
    "NUMBER",
    "POSITIVE",
    "RATES",
    "SHARE",
    "SWITCH",
    "THREE_RATES",
    "TWO_NUMBERS",
    "WHOLE",
    "Setting",
    "optional",
]


@dataclass(frozen=True)
class Setting:
    """A kind of value."""

    words: str
    """As messages say it: "number, at least 0"."""
    fits: Callable[[object], bool]


def _is_number(value: object, low: float = 0.0, below: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < below


def numbers(count: int, each: Setting, words: str) -> Setting:
    """So many values of a kind, `words` in the plural."""

    def fits(value: object) -> bool:
        return isinstance(value, list | tuple) and len(value) == count and all(map(each.fits, value))

    return Setting(f"{('two', 'three')[count - 2]} numbers {words}", fits)


def optional(setting: Setting) -> Setting:
    """The same, or none."""
    return Setting(f"{setting.words}, or none", lambda value: value is None or setting.fits(value))


NUMBER = Setting("number, at least 0", _is_number)
POSITIVE = Setting("number above 0", lambda value: _is_number(value) and value != 0)
SHARE = Setting("number from 0 to below 1", lambda value: _is_number(value, below=1))
WHOLE = Setting("whole number, at least 1", lambda value: _is_number(value, 1) and isinstance(value, int))
SWITCH = Setting("true or false", lambda value: isinstance(value, bool))
INNER = Setting("number between 0 and 1", lambda value: _is_number(value, below=1) and value != 0)
FACTOR = Setting("number, at least 1", lambda value: _is_number(value, 1))
RATES = numbers(2, SHARE, "from 0 to below 1")
"""The decay rates of two moments."""
INNER_RATES = numbers(2, INNER, "between 0 and 1")
THREE_RATES = numbers(3, INNER, "between 0 and 1")
TWO_NUMBERS = numbers(2, NUMBER, "at least 0")
