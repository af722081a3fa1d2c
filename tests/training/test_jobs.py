from __future__ import annotations

import os
import signal
import subprocess
import sys
from fractions import Fraction

import pytest

from simpletuner.training.jobs import Asked, Due, Inbox, Upcoming

SAVING = Due(steps=10, at_end=True, asked="save")
PAINTING = Due(steps=5, at_start=True, at_end=True, asked="validate")


def met(due: Due, step: int, asked: Asked = Asked(), *, is_start: bool = False, is_end: bool = False) -> bool:  # noqa: B008
    return due.met(step, asked, is_start=is_start, is_end=is_end)


def test_a_job_comes_at_its_interval_and_at_the_end() -> None:
    assert [step for step in range(1, 33) if met(SAVING, step, is_end=step == 32)] == [10, 20, 30, 32]


def test_a_start_is_no_step_of_the_interval() -> None:
    assert not met(SAVING, 0, is_start=True)
    assert not met(SAVING, 20, is_start=True)
    assert met(PAINTING, 7, is_start=True)


def test_a_run_that_begins_at_its_end_does_the_work_of_the_end() -> None:
    assert met(SAVING, 32, is_start=True, is_end=True)


def test_an_interval_of_zero_means_only_the_other_times() -> None:
    assert not any(met(Due(at_end=True), step) for step in range(100))


def test_intervals_of_epochs_end_where_they_end_between_steps_too() -> None:
    half_of_five = Due(epoch_steps=Fraction(5, 2))
    assert [step for step in range(13) if met(half_of_five, step)] == [3, 5, 8, 10]
    third_of_ten = Due(epoch_steps=Fraction(10, 3), steps=6)
    assert [step for step in range(13) if met(third_of_ten, step)] == [4, 6, 7, 10, 12]
    assert [step for step in range(4) if met(Due(epoch_steps=Fraction(1, 3)), step)] == [1, 2, 3]


def test_wishes_reach_the_jobs_that_answer_them() -> None:
    assert met(SAVING, 3, Asked(save=True))
    assert not met(PAINTING, 3, Asked(save=True))
    assert met(PAINTING, 3, Asked(validate=True))


def test_who_wants_to_leave_waits_for_saving_only() -> None:
    stop = Asked(signal_number=2, save=True)
    assert met(SAVING, 3, stop)
    assert not met(PAINTING, 5, stop, is_end=True)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (signal.SIGINT, Asked(2, save=True)),
        (signal.SIGTERM, Asked(15, save=True)),
        (signal.SIGUSR1, Asked(save=True)),
        (signal.SIGUSR2, Asked(validate=True)),
    ],
)
def test_a_signal_is_taken_once(sent: int, expected: Asked) -> None:
    with Inbox() as inbox:
        os.kill(os.getpid(), sent)
        assert inbox.take() == expected
        assert inbox.take() == Asked()


def test_a_second_ctrl_c_ends_the_program_at_once() -> None:
    with Inbox():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


TWICE = """
import os
from simpletuner.training.jobs import Inbox
with Inbox():
    for turn in "12":
        os.kill(os.getpid(), 15)
        print(turn, flush=True)
"""


def test_a_second_sigterm_ends_the_program_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "1\n"), ended.stderr


def test_after_the_block_signals_do_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with Inbox():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_next_of_each_job_is_so_many_steps_off_and_the_end_counts_where_it_is_due_then() -> None:
    dues = [Due(steps=10, at_end=True, name="checkpoint"), Due(steps=7, name="gallery"), Due(steps=3), Due(name="never")]
    upcoming = Upcoming(dues, last=25)
    assert upcoming.after(0) == {"checkpoint": 10, "gallery": 7}
    assert upcoming.after(9) == {"checkpoint": 1, "gallery": 5}
    assert upcoming.after(10) == {"checkpoint": 10, "gallery": 4}
    assert upcoming.after(20) == {"checkpoint": 5, "gallery": 1}
    assert upcoming.after(21) == {"checkpoint": 4}
    assert upcoming.after(25) == {}
