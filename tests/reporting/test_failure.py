from __future__ import annotations

import pytest

from simpletuner.errors import Interrupted, RunError
from simpletuner.events import Event, Notice, RunFailed
from simpletuner.reporting.failure import telling_failures

FAILURES = [
    (RunError("It broke.", "for s3cr3t reasons.", "mend it."), RunFailed("It broke.", "for *** reasons.", "mend it.")),
    (
        Interrupted(2, "Stopped at step 5.", "start again."),
        RunFailed("Stopped at step 5.", "", "start again.", is_stopped=True),
    ),
    (KeyboardInterrupt(), RunFailed("Interrupted.", is_stopped=True)),
    (OSError(28, "No space left"), RunFailed("OSError: [Errno 28] No space left")),
    (ValueError("first s3cr3t\nsecond"), RunFailed("ValueError: first ***")),
    (AssertionError(), RunFailed("AssertionError")),
]


@pytest.mark.parametrize(("error", "expected"), FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
def test_what_ends_a_run_is_told_without_secrets_and_goes_on_its_way(error: BaseException, expected: RunFailed) -> None:
    told: list[Event] = []

    def fail() -> None:
        with telling_failures(told.append, ["s3cr3t"]) as tell:
            tell(Notice("before"))
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert told == [Notice("before"), expected]


def test_a_run_that_ends_well_has_no_failure_to_tell() -> None:
    told: list[Event] = []
    with telling_failures(told.append):
        pass
    assert told == []
