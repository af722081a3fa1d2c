"""Ranks: everybody's answer for everybody, and a failure that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from simpletuner.data.ranks import Alone, together
from simpletuner.errors import RunError


class TwoRanks:
    """Two threads that meet as two processes would."""

    ranks = 2

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.rank, self._meeting, self._table = rank, meeting, table

    def barrier(self) -> None:
        self._meeting.wait()

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self.barrier()
        return list(self._table)


def on_two_ranks(work: Callable[[int], Any]) -> list[Any]:
    """What `together` answers, or raises, on each of two ranks."""
    meeting, table, answers = threading.Barrier(2, timeout=5), [None, None], [None, None]

    def run(rank: int) -> None:
        try:
            answers[rank] = together(TwoRanks(rank, meeting, table), lambda: work(rank))
        except RunError as error:
            answers[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_alone_one_hears_oneself() -> None:
    assert together(Alone(), lambda: "done") == ["done"]


def test_every_rank_hears_every_answer_in_order() -> None:
    assert on_two_ranks(lambda rank: rank * 10) == [[0, 10], [0, 10]]


def test_where_one_rank_fails_the_other_stops_with_its_words() -> None:
    def work(rank: int) -> str:
        if rank == 1:
            raise RunError("The disk is full.")
        return "fine"

    first, second = on_two_ranks(work)
    assert str(second) == "The disk is full."
    assert isinstance(first, RunError)
    assert "Process 1 of 2" in str(first)
    assert "The disk is full." in str(first)


def test_a_fault_of_ours_is_not_dressed_up_as_the_users() -> None:
    with pytest.raises(ZeroDivisionError):
        together(Alone(), lambda: 1 / 0)
