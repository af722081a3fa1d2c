"""Events as JSON for programs, one POST each: what `docs/webhook-events.schema.json` describes. Pictures are base64 PNG.

A change that would break a reader raises `VERSION`; new types and keys do not.
"""

from __future__ import annotations

import base64
import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from simpletuner.events import (
    Event,
    Measured,
    Notice,
    Painted,
    Previewed,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    Saved,
    Stepped,
)
from simpletuner.reporting.posting import Post

__all__ = ["VERSION", "Raw", "picture_bytes"]

VERSION = 1
TYPES = {
    RunStarted: "run_started",
    RunFinished: "run_finished",
    RunFailed: "run_failed",
    Notice: "notice",
    Progress: "progress",
    Stepped: "step",
    Measured: "measured",
    Saved: "saved",
    Previewed: "preview",
}


class Raw:
    """The format of `webhook_type` raw."""

    overtaken: tuple[type[Event], ...] = (Progress,)

    def __init__(self, run: str, prefix: str = "") -> None:
        """`run` is the run's name; `run_id` tells this start of it from others."""
        self._head = {"version": VERSION, "run": run, "run_id": uuid.uuid4().hex, "prefix": prefix}
        self._sequence = 0

    def event(self, event: Event) -> Callable[[int], Iterable[Post]]:
        """One POST."""
        head = self._next()
        return lambda dropped: [_post({**head, "dropped": dropped, **_event(event)})]

    def gallery(self, pictures: list[Painted]) -> Callable[[int], Iterable[Post]]:
        """One POST for all of them."""
        head = self._next()
        return lambda dropped: [_post({**head, "dropped": dropped, **_gallery(pictures)})]

    def _next(self) -> dict[str, Any]:
        """What every event begins with. Numbered when it happened: a gap is an event that was dropped."""
        self._sequence += 1
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        return {**self._head, "sequence": self._sequence, "time": now}


def _post(content: Mapping[str, Any]) -> Post:
    """The body. Numbers that JSON does not know are null."""
    text = json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))
    return Post(text.encode("ascii"), "application/json")


def _event(event: Event) -> dict[str, Any]:
    """An event's own keys, with its type."""
    content = {"type": TYPES[type(event)], **asdict(event)}
    if isinstance(event, Stepped):
        content["figures"] = content.pop("extra")
    if isinstance(event, Previewed):
        content["png"] = base64.b64encode(event.png).decode("ascii")
    return content


def _gallery(pictures: list[Painted]) -> dict[str, Any]:
    """Pictures that were painted one after another, read from disk now; `png` is null where one is gone."""
    shown = [
        {
            "nickname": one.nickname,
            "prompt": one.prompt,
            "weights": one.weights,
            "file": one.path.name,
            "png": _encoded(one.path),
        }
        for one in pictures
    ]
    return {"type": "gallery", "step": pictures[0].step, "pictures": shown}


def picture_bytes(path: Path) -> bytes | None:
    """The file, or None where it cannot be read: it may have been moved away since."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _encoded(path: Path) -> str | None:
    content = picture_bytes(path)
    return None if content is None else base64.b64encode(content).decode("ascii")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
