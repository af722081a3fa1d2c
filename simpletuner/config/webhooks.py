"""`webhook_config`: where a run is told of, read and judged before any work. Nothing is sent to find out: syntax only.

An endpoint may be asleep now and awake when the first picture is done, and a check that posts would be seen by people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from simpletuner.config.run import Run
from simpletuner.config.secrets import MASK, SECRETS, masked, secrets_in
from simpletuner.config.sections import Reporting
from simpletuner.config.settings import SWITCH, Setting
from simpletuner.config.sources import read_json
from simpletuner.config.spelling import MissingVariableError, expand, nearest
from simpletuner.errors import ConfigError, Problem

__all__ = ["LEVELS", "Endpoint", "endpoints_of", "secrets_of", "webhook_problems", "written_secrets"]

LEVELS = ("debug", "info", "warning", "error", "critical")
KINDS = ("discord", "raw")
CHOICES = {"webhook_type": KINDS, "log_level": LEVELS}

URL = Setting("an address such as https://host/path", lambda value: isinstance(value, str) and _is_address(value))
TEXT = Setting("text", lambda value: isinstance(value, str))
TOKEN = Setting("text of plain ASCII letters", lambda value: isinstance(value, str) and _is_token(value))


def _one_of(*names: str) -> Setting:
    return Setting(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value.lower() in names)


SETTINGS: Mapping[str, Setting] = {
    "webhook_type": _one_of(*KINDS),
    "webhook_url": URL,
    "callback_url": URL,
    "message_prefix": TEXT,
    "log_level": _one_of(*LEVELS),
    "auth_token": TOKEN,
    "ssl_no_verify": SWITCH,
}
EXAMPLE = '{"webhook_type": "raw", "callback_url": "https://..."}'


@dataclass(frozen=True)
class Endpoint:
    """One address that a run is told of."""

    kind: str
    """`discord` or `raw`."""
    url: str = field(repr=False)
    prefix: str = ""
    level: str = "info"
    token: str = field(default="", repr=False)
    """Sent as `Authorization: Bearer`; "" for none."""
    verifies: bool = True
    """Whether the server's certificate is checked."""

    @property
    def title(self) -> str:
        """What it is called before users: its host and no more, for the rest of the address may be its key."""
        return f"{self.kind} webhook at {urlsplit(self.url).hostname}"


def endpoints_of(reporting: Reporting, environ: Mapping[str, str] = os.environ) -> tuple[Endpoint, ...]:
    """The endpoints that are asked for. `webhook_problems` found nothing wrong with them. Raises ConfigError."""
    return tuple(_endpoint(entry) for entry in _entries(reporting, environ))


def secrets_of(run: Run, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Every secret of this run, those of the webhooks' file too, so that it can be blotted out of what is told."""
    return (*written_secrets(run), *secrets_in(_entries(run.reporting, environ)))


def written_secrets(run: Run) -> tuple[str, ...]:
    """Those that stand in the options themselves, and so perhaps on the command line. Reads no file."""
    return tuple(secrets_in([dict(part) for part in (run.reporting, *run.datasets, *run.eval_datasets, run.text_embeds)]))


def _endpoint(entry: Mapping[str, Any]) -> Endpoint:
    return Endpoint(
        kind=_kind(entry),
        url=entry.get("webhook_url") or entry["callback_url"],
        prefix=entry.get("message_prefix", ""),
        level=entry.get("log_level", "info").lower(),
        token=entry.get("auth_token", ""),
        verifies=not entry.get("ssl_no_verify", False),
    )


def _kind(entry: Mapping[str, Any]) -> str:
    """Unset: as the guides pair them, a `callback_url` is raw, a `webhook_url` is Discord's."""
    return str(entry.get("webhook_type", "raw" if "callback_url" in entry else "discord")).lower()


def _entries(reporting: Reporting, environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """What is written, one object for each endpoint, from its file if it is one; null unsets. Raises ConfigError."""
    written: Any = reporting.webhook_config
    if written is None:
        return []
    content = written
    if isinstance(written, str):
        content = read_json(Path(written).absolute(), Path.cwd())
        try:
            content = expand(content, environ)
        except MissingVariableError as error:
            raise ConfigError([_problem(f"{written} names {error}", "", f"export {error.name}=...")]) from error
    entries = list(content) if isinstance(content, list | tuple) else [content]
    if not all(isinstance(entry, Mapping) for entry in entries):
        what = f"{written} holds no object" if isinstance(written, str) else "it is no object"
        raise ConfigError(
            [_problem(what, "an endpoint is an object, several are a list of them.", f"Write such as {EXAMPLE}.")]
        )
    return [{key: value for key, value in entry.items() if value is not None} for entry in entries]


def webhook_problems(run: Run) -> Iterator[Problem]:
    """What is wrong with `webhook_config`, all at once. Reads its file."""
    try:
        entries = _entries(run.reporting, os.environ)
    except ConfigError as error:
        for one in error.problems:
            what = one.what if one.option == "webhook_config" else f"`webhook_config`: {one.what}"
            yield Problem("webhook_config", what, one.why, one.mend)
        return
    for number, entry in enumerate(entries, 1):
        place = f"endpoint {number}: " if len(entries) > 1 else ""
        yield from _judged(entry, place)


def _judged(entry: Mapping[str, Any], place: str) -> Iterator[Problem]:
    for key, value in entry.items():
        if key not in SETTINGS:
            near = nearest(str(key), SETTINGS)
            mend = f"Did you mean `{near}`?" if near else "Remove it."
            yield _problem(f"{place}it has no setting `{key}`", f"known: {', '.join(SETTINGS)}.", mend)
        elif not SETTINGS[key].fits(value):
            yield _misfit(key, value, place)
    addresses = {entry[key] for key in ("webhook_url", "callback_url") if key in entry}
    if not addresses and not any(nearest(str(key), SETTINGS) in ("webhook_url", "callback_url") for key in entry):
        yield _problem(f"{place}there is no address", "", "Add `webhook_url` (Discord) or `callback_url` (raw).")
    if len(addresses) > 1:
        yield _problem(
            f"{place}`webhook_url` and `callback_url` differ", "an endpoint has one address.", "Write two endpoints."
        )
    if "auth_token" in entry and _kind(entry) == "discord":
        why = "Discord takes none: its webhook's address is the key."
        yield _problem(f"{place}there is an `auth_token`", why, 'Remove it, or set `webhook_type` to "raw".')


def _misfit(key: str, value: Any, place: str) -> Problem:
    """A value of the wrong kind; a secret one is not shown."""
    shown = json.dumps(masked(value, key), ensure_ascii=False, default=str)
    mend = ""
    if value == MASK and key in SECRETS:
        mend = "It was blotted out when the config was saved: write it anew, best as {env:NAME}."
    elif near := nearest(str(value), CHOICES.get(key, ())):
        mend = f'Did you mean "{near}"?'
    elif key in ("webhook_url", "callback_url") and isinstance(value, str) and _has_login(value):
        mend = "Write it without user and password; `auth_token` is sent as a bearer token."
    return _problem(f"{place}`{key}` is {shown}", f"it takes: {SETTINGS[key].words}.", mend)


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError:  # a bracket, a port or a name ("a..b") that is none
        return False
    is_plain = text.isascii() and text.isprintable() and " " not in text
    return is_plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not _has_login(text)


def _is_token(text: str) -> bool:
    return text.isascii() and text.isprintable() and text.strip() not in ("", MASK)


def _has_login(text: str) -> bool:
    try:
        return urlsplit(text).username is not None
    except ValueError:
        return False


def _problem(what: str, why: str, mend: str) -> Problem:
    return Problem("webhook_config", f"`webhook_config`: {what}.", why, mend or "Write such a value, or leave it out.")
