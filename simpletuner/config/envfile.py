"""`config.env`, the deprecated shell format: assignments are understood, nothing is executed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["EnvContent", "read_env"]

ARGUMENTS = "TRAINER_EXTRA_ARGS"


@dataclass(frozen=True)
class EnvContent:
    """What a `config.env` says."""

    values: Mapping[str, str]
    """Name, as written -> value, without `TRAINER_EXTRA_ARGS`."""
    arguments: tuple[str, ...]
    """The words of `TRAINER_EXTRA_ARGS`."""
    helpers: frozenset[str]
    """Names that other lines expand (`${NAME}`): they need not be options."""
    skipped: tuple[tuple[int, str], ...]
    """(line number, text) of lines that are no assignments."""


def read_env(text: str, environ: Mapping[str, str]) -> EnvContent:
    """Assignments `NAME=value` and `export NAME=value`, later ones seeing earlier ones and the environment by `${NAME}`."""
    values: dict[str, str] = {}
    helpers: set[str] = set()
    skipped: list[tuple[int, str]] = []
    for number, line in _logical_lines(text):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ASSIGNMENT.fullmatch(line.strip())
        value = _value(match[2], {**environ, **values}, helpers) if match else None
        if match is None or value is None:
            skipped.append((number, line.strip()))
        else:
            values[match[1]] = value
    words = tuple(shlex.split(values.pop(ARGUMENTS, "")))
    return EnvContent(values, words, frozenset(helpers), tuple(skipped))


_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_PIECE = re.compile(
    r"""'(?P<single>[^']*)' | "(?P<double>(?:\\.|[^"\\])*)" | (?P<bare>(?:\\.|[^\s'"\\#;&|<>()`])+ | (?<!\s)\#) """,
    re.VERBOSE | re.DOTALL,
)
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their number; a backslash at the end or an open quote joins the next one, as in a shell."""
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        start = start or number
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            pending += line[:-1]
            continue
        pending += line
        if _is_open(pending):
            pending += "\n"
            continue
        yield start, pending
        pending, start = "", 0
    if pending:
        yield start, pending


def _is_open(line: str) -> bool:
    """Whether a quote of an assignment's value is not closed yet."""
    match = _ASSIGNMENT.fullmatch(line.strip())
    if match is None:
        return False
    rest = match[2]
    while piece := _PIECE.match(rest):
        rest = rest[piece.end() :]
    return rest[:1] in ("'", '"')


def _value(text: str, known: Mapping[str, str], helpers: set[str]) -> str | None:
    """The value after "=", quotes taken off and references expanded. None if more than a comment follows it."""

    def expanded(part: str) -> str:
        def fetch(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            helpers.add(name)
            return known.get(name, "")

        return re.sub(r"\\(.)", r"\1", _REFERENCE.sub(fetch, part))

    parts = []
    position = 0
    while piece := _PIECE.match(text, position):
        position = piece.end()
        parts.append(piece["single"] if piece["single"] is not None else expanded(piece["double"] or piece["bare"] or ""))
    rest = text[position:].strip()
    return None if rest and not rest.startswith(("#", ";")) else "".join(parts)
