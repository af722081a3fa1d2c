"""Options that were written but are not obeyed here, by the `when` of their declaration: told, never silently ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from simpletuner.config.options import Option

__all__ = ["holds", "without_effect"]


def holds(when: str, values: Mapping[str, Any]) -> bool:
    """Whether a condition such as "crop=true and crop_aspect=closest|random", "a!=x" or "a>0" is met; "" always is.

    A name alone is met where that option is set, "a=unset" where it is None. "or" binds weakest.
    """
    alternatives = [part.split(" and ") for part in when.split(" or ")]
    return any(all(_one(condition, values) for condition in conditions if condition) for conditions in alternatives)


def _one(condition: str, values: Mapping[str, Any]) -> bool:
    if "!=" in condition:
        return not _one(condition.replace("!=", "="), values)
    if ">" in condition:
        name, _, limit = condition.partition(">")
        return float(values[name] or 0) > float(limit)
    name, equals, wanted = condition.partition("=")
    value = values[name]
    if not equals:
        return bool(value)
    word = "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return word in wanted.split("|")


def without_effect(options: Iterable[Option], written: Iterable[str], values: Mapping[str, Any]) -> list[str]:
    """A line for each written option, other than its default, whose condition is not met."""
    names = set(written)
    changed = [option for option in options if option.name in names and values[option.name] != option.info.default]
    idle = [option for option in changed if not holds(option.when, values)]
    return [f"`{option.name}` has no effect here: it is obeyed only with {option.when}." for option in idle]
