"""What must not be told: keys whose values are secret, masked wherever a value is shown, saved or sent.

Known by name, since they also stand within objects and in files that are read before any option is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from simpletuner.config.spelling import canonical_key, relaxed_json, uses_environment

__all__ = ["MASK", "SECRETS", "hidden", "masked", "masked_address", "masked_line", "masked_words", "secrets_in"]

MASK = "***"
SECRETS = frozenset({"webhook_url", "callback_url", "auth_token", "aws_access_key_id", "aws_secret_access_key"})
"""Keys of the main config, of a dataset or of an object in either. Whoever has a Discord webhook's URL can write there."""
OBJECTS = frozenset({"webhook_config"})
"""Options that hold such keys, perhaps as JSON text."""
SHORTEST = 4
"""Characters below which a value is too common a text to be blotted out of others."""


def masked(value: Any, name: str = "") -> Any:
    """`value` of the option or key `name` with every secret in it as "***". `{env:NAME}` stays: it says where, not what."""
    key = canonical_key(name)
    if key in SECRETS:
        return value if value is None or value == "" or uses_environment(value) else MASK
    if isinstance(value, Mapping):
        return {name: masked(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    if key in OBJECTS and isinstance(value, str):
        return _masked_text(value)
    return value


def _masked_text(text: str) -> Any:
    """An object as JSON text is shown as the object; what is neither that nor a path is not shown at all."""
    if not text.lstrip().startswith(("{", "[")):
        return MASK if "://" in text else text
    try:
        return masked(json.loads(relaxed_json(text)))
    except ValueError:
        return MASK


def masked_line(line: str) -> str:
    """A line of a file that could not be read: the text after a secret's key is blotted out, at the same length."""
    return _PAIR.sub(lambda match: match[1] + "*" * len(match[2]), line)


_PAIR = re.compile(rf"""((?:{"|".join(SECRETS)})["']?\s*[:=]\s*["']?)([^\s"',}}]+)""", re.IGNORECASE)


def masked_address(text: str) -> str:
    """Addresses in `text` down to their hosts: of a word that stands where none should, nobody knows what it is."""
    return _ADDRESS.sub(r"\1/***", text)


_ADDRESS = re.compile(r"""(\w+://[^/\s"']+)/[^\s"']+""")


def masked_words(words: Sequence[str]) -> list[str]:
    """A command line's words, with what options that hold secrets are given as `masked` shows it."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if equals and canonical_key(name) in OBJECTS:
            shown.append(f"{name}={_as_word(masked(value, name))}")
        elif before.startswith("--") and canonical_key(before) in OBJECTS:
            shown.append(_as_word(masked(word, before)))
        else:
            shown.append(word)
    return shown


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def secrets_in(value: Any) -> Iterator[str]:
    """Every secret that stands in a plain value: what must be blotted out of texts of others."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if isinstance(item, str) and canonical_key(str(name)) in SECRETS:
                yield item
            else:
                yield from secrets_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from secrets_in(item)


def hidden(text: str, secrets: Iterable[str]) -> str:
    """`text` with every one of these in it as "***", the longest first: one may hold another."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, MASK)
    return text
