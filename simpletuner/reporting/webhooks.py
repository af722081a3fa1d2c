"""The sink that tells webhooks: which event is worth a message, and to whom. Sending is `outbox.py`'s, in its own thread.

Pictures, previews, measures, checkpoints, the run's beginning, end and failure are always told; lines follow `log_level`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

from simpletuner.config.run import Run
from simpletuner.config.secrets import hidden
from simpletuner.config.webhooks import LEVELS, Endpoint, endpoints_of, secrets_of
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
    Tell,
)
from simpletuner.reporting.discord import Discord, delivered_url
from simpletuner.reporting.outbox import Letter, Outbox, Patience, Worth
from simpletuner.reporting.posting import Post, Poster
from simpletuner.reporting.raw import Raw
from simpletuner.reporting.waiting import told_if_long

__all__ = ["Webhook", "webhooks"]

PROGRESS_EVERY_S = 10.0
"""Pause between two messages of one long task."""
MOST_PICTURES = 10
"""Of a gallery, in one message."""
WORTH = {
    Progress: Worth.PASSING,
    Previewed: Worth.PASSING,
    Stepped: Worth.PASSING,
    Notice: Worth.USEFUL,
    Measured: Worth.LASTING,
    Saved: Worth.LASTING,
    RunStarted: Worth.VITAL,
    RunFinished: Worth.VITAL,
    RunFailed: Worth.VITAL,
}
"""Of the events that are told. A gallery's pictures are one letter, of lasting worth."""


class Format(Protocol):
    """How one kind of endpoint is told. What is made is posted later, by the outbox's thread, which says what was dropped."""

    overtaken: tuple[type[Event], ...]
    """Events of which only the newest is wanted, where several wait."""

    def event(self, event: Event) -> Callable[[int], Iterable[Post]]:
        """An event other than a picture."""

    def gallery(self, pictures: list[Painted]) -> Callable[[int], Iterable[Post]]:
        """Pictures that were painted one after another. Their files are read when it is their turn."""


class Webhook:
    """The sink of one endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        run: str,
        secrets: Iterable[str] = (),
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`run` is the run's name, `secrets` what no message may hold. `clock` gives seconds."""
        self._endpoint = endpoint
        self._secrets = tuple(secrets)
        self._clock = clock
        self._said_s: dict[str, float] = {}
        self._pictures: list[Painted] = []
        is_discord = endpoint.kind == "discord"
        self._format: Format = Discord(endpoint.prefix) if is_discord else Raw(run, endpoint.prefix)
        patience = patience or Patience()
        url = delivered_url(endpoint.url) if is_discord else endpoint.url
        poster = Poster(url, token=endpoint.token, verifies=endpoint.verifies, timeout_s=patience.answer_s)
        self._outbox = Outbox(endpoint.title, poster, patience)

    def __str__(self) -> str:
        return self._endpoint.title

    def __call__(self, event: Event) -> None:
        """Queue what an event says; returns at once."""
        event = _clean(event, self._secrets)
        if isinstance(event, Painted):
            if self._pictures and (len(self._pictures) == MOST_PICTURES or self._pictures[0].step != event.step):
                self._send_pictures()
            self._pictures.append(event)
            return
        if not isinstance(event, Previewed | Progress) or _is_over(event):  # neither of them ends a gallery that goes on
            self._send_pictures()
        if self._is_told(event):
            self._send(event)

    def close(self) -> None:
        """No more events; what waits has a bounded time from now. Returns at once."""
        self._send_pictures()
        self._outbox.close()

    def wait(self) -> None:
        """Return when everything is sent, or that time is over."""
        self._outbox.wait()

    def _is_told(self, event: Event) -> bool:
        """Whether `log_level` lets it pass; of a long task's progress, one in ten seconds and the last."""
        level = LEVELS.index(self._endpoint.level)
        if isinstance(event, Notice):
            return level <= LEVELS.index(event.level)
        if isinstance(event, Stepped):
            return level <= LEVELS.index("info")
        if not isinstance(event, Progress):
            return type(event) in WORTH
        return level <= LEVELS.index("debug") and self._is_due(event)

    def _is_due(self, event: Progress) -> bool:
        if _is_over(event):
            return self._said_s.pop(event.task, None) is not None
        now_s = self._clock()
        if now_s - self._said_s.get(event.task, now_s - PROGRESS_EVERY_S) < PROGRESS_EVERY_S:
            return False
        self._said_s[event.task] = now_s
        return True

    def _send(self, event: Event) -> None:
        is_warning = isinstance(event, Notice) and event.level == "warning"
        task = event.task if isinstance(event, Progress) else ""
        letter = Letter(
            worth=Worth.VITAL if is_warning else WORTH[type(event)],
            posts=self._format.event(event),
            held_bytes=len(event.png) if isinstance(event, Previewed) else 0,
            replaces=f"{type(event).__name__} {task}" if isinstance(event, self._format.overtaken) else "",
        )
        self._outbox.put(letter)

    def _send_pictures(self) -> None:
        if self._pictures:
            self._outbox.put(Letter(Worth.LASTING, self._format.gallery(self._pictures)))
            self._pictures = []


def _is_over(event: Event) -> bool:
    return isinstance(event, Progress) and event.done >= event.total


def _clean(event: Event, secrets: tuple[str, ...]) -> Event:
    """The event without secrets in its texts."""
    texts: dict[str, Any] = {one.name: vars(event)[one.name] for one in fields(event)}
    return replace(event, **{name: hidden(text, secrets) for name, text in texts.items() if isinstance(text, str)})


@contextmanager
def webhooks(run: Run, tell: Tell, patience: Patience | None = None) -> Iterator[list[Webhook]]:
    """The sinks of `webhook_config`; at the end they share one bounded wait, which `tell` hears of if it is long."""
    secrets = secrets_of(run)
    name = Path(run.checkpointing.output_dir).absolute().name
    patience = patience or Patience()
    sinks = [Webhook(one, run=name, secrets=secrets, patience=patience) for one in endpoints_of(run.reporting)]
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()
        waits = f"Waiting for webhooks to take what is left, at most {patience.closing_s:.0f} s. Ctrl-C ends that."
        with told_if_long(tell, waits):
            for sink in sinks:
                sink.wait()
