"""What the data layer needs to know of other processes: who am I of how many, wait for all, tell all.

The engine implements `Ranks` over a CPU process group; `Alone` is a run of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from simpletuner.errors import RunError, SimpletunerError

__all__ = ["Alone", "Ranks", "together"]


class Ranks(Protocol):
    """The processes of one run."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def ranks(self) -> int:
        """How many there are."""

    def barrier(self) -> None:
        """Return when all have come here."""

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value in order of rank, on every rank. Values must survive JSON."""


class Alone:
    """The one process of an ordinary run."""

    rank = 0
    ranks = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        """One value: our own."""
        return [value]


def together(ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    """Everybody's answer to `work`, in order of rank; where one rank fails, all stop.

    Without this the others would wait for the failed one until the process group's timeout, hours later.
    """
    answer, failure = None, None
    try:
        answer = work()
    except SimpletunerError as error:
        failure = error
    told = ranks.gather([None if failure is None else str(failure), answer])
    if failure is not None:
        raise failure
    for rank, (text, _) in enumerate(told):
        if text is not None:
            raise RunError(f"Process {rank} of {ranks.ranks} stopped: {text}")
    return [answer for _, answer in told]
