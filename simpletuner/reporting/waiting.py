"""Waits that a user may wonder about: a line says what for, once they are longer than a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from simpletuner.events import Notice, Tell

__all__ = ["told_if_long"]

MOMENT_S = 2.0
"""What nobody wonders about."""


@contextmanager
def told_if_long(tell: Tell, text: str) -> Iterator[None]:
    """Tell `text` if the block takes longer than a moment: by a thread of its own, since this one waits."""
    timer = threading.Timer(MOMENT_S, tell, [Notice(text)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
