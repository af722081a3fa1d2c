from __future__ import annotations

import threading
import time

import pytest

from simpletuner.events import Event, Notice
from simpletuner.reporting import waiting
from simpletuner.reporting.waiting import told_if_long


def test_a_wait_is_told_while_it_lasts_and_a_short_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOMENT_S", 0.05)
    told: list[Event] = []
    is_told = threading.Event()

    def tell(event: Event) -> None:
        told.append(event)
        is_told.set()

    with told_if_long(tell, "waiting"):
        assert is_told.wait(5)
    assert told == [Notice("waiting")]
    with told_if_long(told.append, "never said"):
        pass
    time.sleep(0.1)
    assert told == [Notice("waiting")]
