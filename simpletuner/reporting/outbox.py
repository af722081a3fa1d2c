"""Messages on their way to one endpoint: a bounded queue, emptied in order by a thread of its own.

To put one in never waits. Where the endpoint is too slow for what happens, the least worth goes first, and is counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from simpletuner.reporting.posting import Answer, Post

__all__ = ["Letter", "Outbox", "Patience", "Worth"]

log = logging.getLogger("simpletuner")


class Worth(IntEnum):
    """What is kept longest when not everything can be."""

    PASSING = 0
    """Progress, previews, figures of a step: soon overtaken."""
    USEFUL = 1
    """Notices."""
    LASTING = 2
    """Pictures, measures, checkpoints."""
    VITAL = 3
    """Warnings; that the run began, ended or failed."""


@dataclass(frozen=True)
class Letter:
    """One event for one endpoint."""

    worth: Worth
    posts: Callable[[int], Iterable[Post]]
    """Given how many letters were dropped so far: what is posted, one after another. Called in the outbox's thread."""
    held_bytes: int = 0
    """Of pictures that it holds in memory while it waits."""
    replaces: str = ""
    """A letter that still waits under the same name is overtaken by this one."""


@dataclass(frozen=True)
class Patience:
    """How long and how much to wait."""

    letters: int = 100
    """Most that wait at once."""
    held_bytes: int = 64 * 2**20
    """Most that they hold at once."""
    attempts: int = 8
    """For each post, before its letter is given up."""
    first_pause_s: float = 1.0
    """After the first failure; each later one doubles it."""
    longest_pause_s: float = 60.0
    longest_limit_s: float = 600.0
    """A server that wants to be left alone for longer is asked again after this."""
    answer_s: float = 10.0
    """For the server to connect, to take some bytes or to give some."""
    closing_s: float = 20.0
    """For what is still waiting when the run ends; in the second half of it only for what is vital."""


class Outbox:
    """A queue and its thread, which is a daemon: a program that must end is not kept."""

    def __init__(self, title: str, post: Callable[[Post], Answer], patience: Patience | None = None) -> None:
        self._title = title
        self._post = post
        self._patience = patience or Patience()
        self._letters: deque[Letter] = deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._closed_at_s: float | None = None
        self._trouble = ""
        """What the endpoint's last failure was; told once, and again at the end if letters were lost."""
        self._thread = threading.Thread(target=self._work, name=title, daemon=True)
        self._thread.start()

    def put(self, letter: Letter) -> None:
        """Queue it; returns at once."""
        with self._changed:
            if self._closed_at_s is not None:
                return
            if letter.replaces:
                self._letters = deque(each for each in self._letters if each.replaces != letter.replaces)
            if letter.held_bytes > self._patience.held_bytes:  # all others would have to go, and it would not fit even so
                self._dropped += 1
                return
            self._letters.append(letter)
            while self._is_full():
                self._letters.remove(min(self._letters, key=lambda each: each.worth))  # of equals the oldest
                self._dropped += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come: what waits has `closing_s` from now. Returns at once; `wait` waits for it."""
        with self._changed:
            self._closed_at_s = time.monotonic()
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when everything is sent or the time is over, at most `closing_s` after `close`; what was lost is told."""
        assert self._closed_at_s is not None, "close() comes first"
        self._thread.join(max(0.0, self._closed_at_s + self._patience.closing_s - time.monotonic()))
        with self._changed:
            lost = self._dropped + len(self._letters) + self._thread.is_alive()
            self._letters.clear()
        if lost:
            messages = "1 message was" if lost == 1 else f"{lost} messages were"
            why = f" (it {self._trouble})" if self._trouble else " (more than it took)"
            log.warning("%s: %s not delivered%s.", self._title, messages, why)

    def _is_full(self) -> bool:
        held_bytes = sum(each.held_bytes for each in self._letters)
        return len(self._letters) > self._patience.letters or held_bytes > self._patience.held_bytes

    # in the thread

    def _work(self) -> None:
        while (letter := self._next()) is not None:
            if not self._deliver(letter):
                with self._changed:
                    self._dropped += 1

    def _next(self) -> Letter | None:
        """The oldest letter, when there is one; None at the end."""
        with self._changed:
            while True:
                while self._letters:
                    letter = self._letters.popleft()
                    if self._has_time(letter):
                        return letter
                    self._dropped += 1
                if self._closed_at_s is not None:
                    return None
                self._changed.wait()

    def _deliver(self, letter: Letter) -> bool:
        try:
            return all(self._send(letter, post) for post in letter.posts(self._dropped))
        except Exception as error:  # noqa: BLE001  # as the bus round a sink: what one letter holds must not end the others
            self._tell(Answer(None, type(error).__name__), is_final=True)
            return False

    def _send(self, letter: Letter, post: Post) -> bool:
        """Post until it is taken, refused for good, or given up."""
        failures = 0
        while True:
            answer = self._post(post)
            if answer.is_done:
                self._pause(letter, answer.pause_s)
                return True
            failures += not answer.is_limited
            self._tell(answer)
            if answer.is_final or failures == self._patience.attempts:
                return False
            back_off_s = min(self._patience.first_pause_s * 2 ** max(0, failures - 1), self._patience.longest_pause_s)
            if not self._pause(letter, max(answer.pause_s, back_off_s)):
                return False

    def _pause(self, letter: Letter, seconds: float) -> bool:
        """Wait so long; False if the run ended meanwhile and there is no time left for this letter."""
        until_s = time.monotonic() + min(seconds, self._patience.longest_limit_s)
        with self._changed:
            while self._has_time(letter):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return True
                ends_s = self._ends_s(letter)
                self._changed.wait(left_s if ends_s is None else min(left_s, ends_s - time.monotonic()))
        return False

    def _has_time(self, letter: Letter) -> bool:
        ends_s = self._ends_s(letter)
        return ends_s is None or time.monotonic() < ends_s

    def _ends_s(self, letter: Letter) -> float | None:
        """When this letter is given up; None while the run goes on."""
        if self._closed_at_s is None:
            return None
        share = 1.0 if letter.worth == Worth.VITAL else 0.5
        return self._closed_at_s + self._patience.closing_s * share

    def _tell(self, answer: Answer, *, is_final: bool = False) -> None:
        reason = answer.reason if answer.status is not None else f"failed: {answer.reason}"
        if not self._trouble and not answer.is_limited:
            again = "that message is left out" if is_final or answer.is_final else "it is tried again later"
            log.warning("%s %s; %s, and training goes on.", self._title, reason, again)
        if not answer.is_limited:
            self._trouble = reason
