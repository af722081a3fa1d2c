"""Written items -> one typed value for each option, the highest layer winning; what is wrong is collected, not raised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simpletuner.config.options import Option
from simpletuner.config.secrets import masked
from simpletuner.config.sources import Written
from simpletuner.config.spelling import MissingVariableError, canonical_key, canonical_value, expand, nearest, read_value
from simpletuner.errors import Problem

__all__ = ["Given", "Merged", "Typed", "Where", "merge", "show", "typed"]


@dataclass(frozen=True)
class Given:
    """A value that the user gave."""

    value: Any
    source: str
    written: Any
    """As the user wrote it, `{env:NAME}` unexpanded: what messages and files may show."""


@dataclass(frozen=True)
class Where:
    """What the meaning of a path or a variable depends on."""

    cwd: Path
    config_folder: Path
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Merged:
    """The winning values by option, their type not looked at yet."""

    given: Mapping[str, Given]
    problems: tuple[Problem, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Typed:
    """Values of the right type; an option in `problems` is left out."""

    given: Mapping[str, Given]
    problems: tuple[Problem, ...]


def show(value: Any) -> str:
    """A value as JSON has it, whole numbers without a point, cut where it is long."""
    plain = int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
    text = json.dumps(plain, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _shown(name: str, value: Any) -> str:
    """A value of this option as messages may show it."""
    return show(masked(value, name))


def merge(
    items: Iterable[Written],
    find: Callable[[str], Option | None],
    where: Where,
    *,
    unknown: Callable[[Written], Problem | str | None],
) -> Merged:
    """Lowest layer first. `null` and "" unset what lies beneath. `unknown` says what a key that nobody declares means."""
    winners: dict[str, Given] = {}
    problems: list[Problem] = []
    notices: list[str] = []
    for item in items:
        key, raw = canonical_key(item.key), canonical_value(canonical_key(item.key), item.value)
        option = find(key)
        if option is None:
            verdict = unknown(item)
            problems += [verdict] if isinstance(verdict, Problem) else []
            notices += [verdict] if isinstance(verdict, str) else []
            continue
        if key in option.also:
            notices.append(f"`{key}` is read as `{option.name}`: {_shown(option.name, raw)} ({item.source}).")
        earlier = winners.get(option.name)
        if earlier and earlier.source == item.source and item.source.startswith("file") and earlier.value != raw:
            problems.append(_twice(option.name, earlier, item))
        winners[option.name] = Given(raw, item.source, raw)
    expanded, missing = _expanded(winners, where.environ)
    kept = {name: given for name, given in expanded.items() if not _is_unset(given.value, find(name))}
    return Merged(kept, tuple(problems + missing), tuple(notices))


def _is_unset(value: Any, option: Option | None) -> bool:
    return value is None or (value == "" and option is not None and not option.keeps_empty)


def _twice(name: str, earlier: Given, item: Written) -> Problem:
    what = f"`{name}` is given twice, as {_shown(name, earlier.written)} and as {_shown(name, item.value)} ({item.source})."
    return Problem(name, what, "two spellings of one name stand there.", "Keep one of them.")


def _expanded(winners: Mapping[str, Given], environ: Mapping[str, str]) -> tuple[dict[str, Given], list[Problem]]:
    expanded: dict[str, Given] = {}
    problems: list[Problem] = []
    for name, given in winners.items():
        try:
            expanded[name] = replace(given, value=expand(given.value, environ))
        except MissingVariableError as error:
            what = f"`{name}` is {_shown(name, given.written)} ({given.source}), but {error}."
            problems.append(Problem(name, what, mend=f"export {error.name}=..., or write the value itself."))
    return expanded, problems


def typed(merged: Mapping[str, Given], options: Mapping[str, Option], where: Where, label: str = "") -> Typed:
    """Each value as its option's type, paths located. `label` names the dataset in messages."""
    given: dict[str, Given] = {}
    problems: list[Problem] = []
    for name, one in merged.items():
        option = options[name]
        try:
            value = option.typed(read_value(option, one.value))
        except ValueError as error:
            problems.append(_wrong(option, one, label, error))
            continue
        if option.path and isinstance(value, str):
            located = _locate(option, replace(one, value=value), where, label)
            if isinstance(located, Problem):
                problems.append(located)
                continue
            value = located
        given[name] = replace(one, value=value)
    return Typed(given, tuple(problems))


def _wrong(option: Option, given: Given, label: str, error: ValueError) -> Problem:
    found = error.errors() if isinstance(error, ValidationError) else []
    own = [str(one["ctx"]["error"]) for one in found if one["type"] == "value_error"]  # said by a validator of ours
    near = nearest(str(given.value), option.choices)
    otherwise = "" if option.info.is_required() else ", or leave it out"
    mend = f"Did you mean {show(near)}?" if near else f"Write such a value{otherwise}."
    what = f"{label}`{option.name}` is {_shown(option.name, given.written)} ({given.source})."
    return Problem(option.name, what, " ".join([f"it takes: {option.wants}.", *own]), mend)


def _locate(option: Option, given: Given, where: Where, label: str) -> str | Problem:
    """A path that is read: from the working directory, else beside the config file. `~` is the user's home."""
    if "\0" in given.value:  # which the calls below do not survive
        what = f"{label}`{option.name}` is {_shown(option.name, given.written)} ({given.source})."
        return Problem(option.name, what, "no path holds the character of number 0.", "Correct the path.")
    path = Path(os.path.expanduser(given.value))
    if option.path == "output":
        return str(path) if given.value.startswith("~") else given.value
    if os.path.exists(where.cwd / path):  # pathlib raises where it may not look
        return str(path) if given.value.startswith("~") else given.value
    beside = where.config_folder / path
    if os.path.exists(beside):
        return str(beside.relative_to(where.cwd) if beside.is_relative_to(where.cwd) else beside)
    if option.path == "repository" and not _looks_local(given.value):
        return given.value
    tried = " and ".join(dict.fromkeys([str(where.cwd / path), str(beside)]))
    what = f"{label}`{option.name}` is {_shown(option.name, given.written)} ({given.source}), which does not exist."
    mend = "Correct the path; a relative one is from the working directory, else from the config file's folder."
    if option.path == "repository":
        mend = "Correct the path, or name a hub repository as owner/name."
    elif os.path.isfile(where.cwd / f"{path}.example"):
        mend = f"cp {path}.example {path} and edit it, or correct the path."
    return Problem(option.name, what, f"looked for {tried}.", mend)


def _looks_local(name: str) -> bool:
    """Whether it can be no hub repository: those are `owner/name`."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")
