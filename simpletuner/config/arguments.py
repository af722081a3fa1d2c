"""The command line's words -> written options: `--key value`, `--key=value`, bare `--key` (true) and `key=value`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.config.options import members
from simpletuner.config.secrets import masked_address
from simpletuner.config.sources import Written
from simpletuner.config.spelling import FALSE, TRUE, canonical_key, nearest
from simpletuner.config.vocabulary import Vocabulary
from simpletuner.errors import Problem, UserError

__all__ = ["COMMAND_LINE", "LAUNCH", "Arguments", "example_of", "read_arguments"]

COMMAND_LINE = "command line"
LAUNCH = {"config_file": "config file to read", "env": "reads config/<env>/config.json", "example": "a bundled example"}
"""Words that say where the options are, and are none themselves."""


@dataclass(frozen=True)
class Arguments:
    """A command line, read."""

    items: tuple[Written, ...]
    launch: dict[str, str]
    """Those of `LAUNCH` that were given."""
    problems: tuple[Problem, ...]


def read_arguments(argv: Sequence[str], vocabulary: Vocabulary, source: str = COMMAND_LINE) -> Arguments:
    """Every word is an option, its value, or a problem."""
    items: list[Written] = []
    problems: list[Problem] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if match := _ASSIGNED.fullmatch(word):
            items.append(Written(match[1], match[2], source))
        elif not _NAME.fullmatch(word):
            problems.append(_stray(word, source))
        elif (value := _following(word, words, vocabulary)) is None:
            problems.append(_without_value(word, vocabulary, source))
        else:
            items.append(Written(word, value, source))
    launch = {canonical_key(item.key): str(item.value) for item in items if canonical_key(item.key) in LAUNCH}
    rest = tuple(item for item in items if canonical_key(item.key) not in LAUNCH)
    return Arguments(rest, launch, tuple(problems))


def example_of(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The bundled example that is asked for (`example=NAME`, `--example NAME`), and the other words.

    Raises UserError if these name another config as well.
    """
    words = list(argv)
    for place, word in enumerate(words):
        if match := _ASSIGNED.fullmatch(word):
            if canonical_key(match[1]) == "example":
                return match[2], _without_config(match[2], words[:place] + words[place + 1 :])
        elif word == "--example" and place + 1 < len(words):
            return words[place + 1], _without_config(words[place + 1], words[:place] + words[place + 2 :])
    return None, words


def _without_config(example: str, words: list[str]) -> list[str]:
    for word in words:
        key = word.partition("=")[0]
        if (word.startswith("--") or "=" in word) and canonical_key(key) in LAUNCH:
            what = f"`example={example}` and `{word}` each name a config (command line)."
            raise UserError(what, mend="keep one of them; other options may go along.")
    return words


_ASSIGNED = re.compile(r"((?:--)?[A-Za-z_][A-Za-z0-9_-]*)=(.*)", re.DOTALL)
_NAME = re.compile(r"--[A-Za-z_][A-Za-z0-9_-]*")


def _following(word: str, words: list[str], vocabulary: Vocabulary) -> str | None:
    """Takes the value of `word` off `words`; "true" for a switch that stands alone; None if a value is missing."""
    option = vocabulary.anywhere(canonical_key(word))
    has_next = bool(words) and not words[0].startswith("--")
    if option is not None and option.is_switch:
        is_value = has_next and (str in members(option.info.annotation) or words[0].strip().lower() in (*TRUE, *FALSE))
        return words.pop(0) if is_value else "true"
    if has_next:
        return words.pop(0)
    return "true" if option is None and canonical_key(word) not in LAUNCH else None  # unknown: told as such later, once


def _without_value(word: str, vocabulary: Vocabulary, source: str) -> Problem:
    option = vocabulary.anywhere(canonical_key(word))
    why = f"It takes: {option.wants}." if option else ""
    return Problem(canonical_key(word), f"`{word}` has no value ({source}).", why, f"Write {word}=VALUE.")


def _stray(word: str, source: str) -> Problem:
    near = nearest(word, LAUNCH)
    mend = f"Did you mean {near}=...?" if near else "Write options as --key value or key=value."
    if word.endswith((".json", ".toml", ".env")):
        mend = f"Did you mean --config_file {word}?"
    return Problem("", f"`{masked_address(word)}` is no option ({source}).", mend=mend)
