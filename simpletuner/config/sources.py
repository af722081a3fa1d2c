"""Where values are written: config files and the environment, read into plain `Written` items. Nothing is judged here
but what cannot be read at all.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from simpletuner.config.envfile import read_env
from simpletuner.config.secrets import masked, masked_line
from simpletuner.config.spelling import canonical_key, nearest, relaxed_json
from simpletuner.errors import ConfigError, Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ENVIRONMENT", "PREFIX", "Written", "environment", "find_config", "read_file", "read_json", "shown"]

PREFIX = "SIMPLETUNER_"
"""What an environment variable must begin with to be an option."""
ENVIRONMENT = "environment"
NAMES = ("config.json", "config.toml", "config.env")


@dataclass(frozen=True)
class Written:
    """One key and its value as somebody wrote them."""

    key: str
    value: Any
    source: str
    """"file config/config.json", "environment", "command line"."""


@dataclass(frozen=True)
class FileContent:
    """What a config file says."""

    items: tuple[Written, ...]
    arguments: tuple[str, ...] = ()
    """Command-line words that it holds (`TRAINER_EXTRA_ARGS`), to be read beneath the real ones."""
    helpers: frozenset[str] = frozenset()
    """Names that only serve other lines of the file."""
    notices: tuple[str, ...] = ()


def shown(path: Path, cwd: Path) -> str:
    """The path as users would write it: relative where it lies below the working directory."""
    return path.relative_to(cwd).as_posix() if path.is_relative_to(cwd) else str(path)


def find_config(config_file: str | None, environment_name: str | None, cwd: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The config file, if there is one, and notices. Raises ConfigError if the one that was asked for is not there."""
    if config_file is not None:
        path = cwd / Path(os.path.expanduser(config_file))
        if path.is_file():
            return path, (f"{config_file} is read; env={environment_name} is not.",) if environment_name else ()
        raise ConfigError([_no_config(config_file, path)])
    if environment_name is not None:
        found, notices = _first(cwd / "config" / environment_name, cwd)
        if found is None:
            raise ConfigError([_no_environment(environment_name, cwd)])
        return found, notices
    found, notices = _first(cwd / "config", cwd)
    if found is None and (cwd / "config.json").is_file():
        return cwd / "config.json", ()
    return found, notices


def _first(folder: Path, cwd: Path) -> tuple[Path | None, tuple[str, ...]]:
    there = [folder / name for name in NAMES if (folder / name).is_file()]
    if not there:
        return None, ()
    rest = [shown(path, cwd) for path in there[1:]]
    return there[0], (f"{shown(there[0], cwd)} is read; {' and '.join(rest)} beside it is not.",) if rest else ()


def _no_config(written: str, path: Path) -> Problem:
    if path.is_dir():
        return Problem("config_file", f"The config file {written} is a folder.", mend=f"Name the file: {written}/config.json.")
    near = nearest(path.name, [p.name for p in path.parent.glob("*") if p.is_file()])
    mend = f"Did you mean {path.parent / near}?" if near else "Correct --config_file; a relative path is from where you are."
    return Problem("config_file", f"There is no config file {written}.", f"{path} does not exist.", mend)


def _no_environment(name: str, cwd: Path) -> Problem:
    known = sorted(folder.name for folder in (cwd / "config").glob("*") if _first(folder, cwd)[0])
    near = nearest(name, known)
    mend = f"Did you mean env={near}?" if near else f"Folders with a config: {', '.join(known) or 'none'}."
    return Problem("env", f"There is no config in config/{name}/.", f"none of {', '.join(NAMES)} is there.", mend)


def read_file(path: Path, cwd: Path, environ: Mapping[str, str]) -> FileContent:
    """A config file in any of the three formats, told by its name. Raises ConfigError."""
    if path.suffix == ".env":
        return _read_env(path, cwd, environ)
    content = _read_toml(path, cwd) if path.suffix == ".toml" else read_json(path, cwd)
    name = shown(path, cwd)
    if not isinstance(content, dict):
        what = f"{name} holds {_kind(content)} where an object with options is wanted."
        mend = "Begin it with { and end it with }; a list of datasets belongs in `data_backend_config`."
        raise ConfigError([Problem("", what, mend=mend)])
    return FileContent(tuple(Written(key, value, f"file {name}") for key, value in content.items()))


def _read_env(path: Path, cwd: Path, environ: Mapping[str, str]) -> FileContent:
    name = shown(path, cwd)
    text = _text(path, cwd)
    try:
        content = read_env(text, environ)
    except ValueError as error:  # shlex's
        what = f"{name}: TRAINER_EXTRA_ARGS cannot be split into words: {error}."
        raise ConfigError([Problem("", what, mend="Close the quote.")]) from error
    notices = [f"{name} is read; that format is deprecated, config.json is what the guides use."]
    notices += [f"{name}, line {line}: skipped, it is no assignment: {text}" for line, text in content.skipped]
    items = tuple(Written(key, value, f"file {name}") for key, value in content.values.items())
    return FileContent(items, content.arguments, content.helpers, tuple(notices))


def read_json(path: Path, cwd: Path) -> Any:
    """JSON with `//` comments and trailing commas. Raises ConfigError that names line and column."""
    text = _text(path, cwd)
    hooks: dict[str, Any] = {"object_pairs_hook": partial(_unique, path, cwd), "parse_constant": partial(_constant, path, cwd)}
    try:
        return json.loads(relaxed_json(text), **hooks)
    except json.JSONDecodeError as error:
        line = masked_line(text.split("\n")[error.lineno - 1].rstrip()) if text.strip() else ""
        start = max(0, error.colno - 40) if len(line) > 76 else 0  # a long line is shown from a little before the fault
        mark = f"{line[start : start + 76]}\n      {' ' * (error.colno - 1 - start)}^"
        what = f"{shown(path, cwd)} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        mend = "Look there and just before: quotes are double, a comma parts entries, true, false and null are lower case."
        raise ConfigError([Problem("", what, mark if line else "the file is empty.", mend)]) from error


def _unique(path: Path, cwd: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen and seen[key] != value:
            one, other = (json.dumps(masked(each, key)) for each in (seen[key], value))
            what = f"{shown(path, cwd)} says `{key}` twice: {one} and {other}."
            raise ConfigError([Problem(canonical_key(key), what, mend="Keep one of them.")])
        seen[key] = value
    return seen


def _constant(path: Path, cwd: Path, word: str) -> Any:
    raise ConfigError([Problem("", f"{shown(path, cwd)} says {word}, which is no number that an option can take.")])


def _read_toml(path: Path, cwd: Path) -> Any:
    try:
        return tomllib.loads(_text(path, cwd))
    except tomllib.TOMLDecodeError as error:
        what = f"{shown(path, cwd)} is not valid TOML: {error}."
        raise ConfigError([Problem("", what, mend="Look there and just before: strings need quotes.")]) from error


def _text(path: Path, cwd: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{shown(path, cwd)} is not UTF-8 text ({error.reason} at byte {error.start})."
        raise ConfigError([Problem("", what, mend="Save the file as UTF-8.")]) from error
    except OSError as error:
        what = f"{shown(path, cwd)} cannot be read: {error.strerror}."
        raise ConfigError([Problem("", what, mend="Correct the path, or make the file readable.")]) from error


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")


def environment(environ: Mapping[str, str]) -> tuple[Written, ...]:
    """The environment's layer: SIMPLETUNER_<OPTION>, and nothing without that prefix."""
    ours = sorted(name for name in environ if name.startswith(PREFIX) and len(name) > len(PREFIX))
    return tuple(Written(name[len(PREFIX) :], environ[name], ENVIRONMENT) for name in ours)
