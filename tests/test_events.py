from __future__ import annotations

import pytest

from simpletuner.events import Bus, Event, Notice


class Breaks:
    """A sink that fails at its second event."""

    def __init__(self, error: BaseException) -> None:
        self.heard: list[Event] = []
        self.error = error

    def __call__(self, event: Event) -> None:
        self.heard.append(event)
        if len(self.heard) == 2:
            raise self.error

    def __str__(self) -> str:
        return "The breaking one"


@pytest.mark.parametrize(
    ("error", "why"), [(OSError("the disk is full"), "the disk is full"), (ConnectionError(), "ConnectionError")]
)
def test_a_sink_that_fails_is_named_once_and_left_out_and_the_others_hear_everything(
    error: Exception, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    breaks, heard = Breaks(error), list[Event]()
    bus = Bus([breaks, heard.append])
    events = [Notice(str(number)) for number in range(4)]
    for event in events:
        bus(event)
    assert heard == events
    assert breaks.heard == events[:2]
    assert caplog.messages == [f"The breaking one failed and is switched off for this run: {why}"]


def test_what_its_user_interrupts_is_no_failure_of_a_sink() -> None:
    bus = Bus([Breaks(KeyboardInterrupt())])
    bus(Notice("first"))
    with pytest.raises(KeyboardInterrupt):
        bus(Notice("second"))
