"""What watchers hear of the gallery's pictures: the same in the same order, however many processes painted them.

A full disk or a folder without permission neither stops a run nor loses a picture in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

from simpletuner.evaluation.files import Account
from simpletuner.events import Notice, Painted, Tell

__all__ = ["PictureNews"]

NAMED = 5
"""How many files a message names."""


class PictureNews:
    """Tells what became of pictures, in the order in which they were expected."""

    def __init__(self) -> None:
        self._expected: dict[str, Painted] = {}

    def expect(self, events: Iterable[Painted]) -> None:
        """What is to be told of pictures that are painted now, once they are there."""
        self._expected |= {str(event.path): event for event in events}

    def tell_painted(self, accounts: Sequence[Account], tell: Tell) -> None:
        """Of the pictures that have their files by now."""
        for path in self._sorted(path for account in accounts for path in account.written):
            tell(self._expected.pop(path))

    def tell_unwritten(self, accounts: Sequence[Account], tell: Tell, *, is_last: bool) -> None:
        """Once a gallery, of the pictures without a file. `is_last`: there is no other gallery to write them with."""
        lost = self._sorted(path for account in accounts for path in account.lost)
        waiting = self._sorted(path for account in accounts for path in account.waiting)
        reason = next((account.reason for account in accounts if account.lost or account.waiting), "")
        if lost:
            text = f"{_listed(lost)} could not be written and {_is(lost)} lost: {reason}."
            mend = " Make room and start the same command again: it paints what is missing of the last step." if is_last else ""
            tell(Notice(text + mend, "warning"))
        if waiting:
            text = f"{_listed(waiting)} could not be written: {reason}. Training goes on; "
            text += f"{_is(waiting)} kept in memory, to be written with the next gallery. Make room till then."
            tell(Notice(text, "warning"))
        for path in lost:
            del self._expected[path]

    def _sorted(self, paths: Iterable[str]) -> list[str]:
        found = set(paths)
        return [path for path in self._expected if path in found]


def _listed(paths: Sequence[str]) -> str:
    names = ", ".join(Path(path).name for path in paths[:NAMED])
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"{len(paths)} picture{'s' if len(paths) > 1 else ''} of {Path(paths[0]).parent} ({names}{more})"


def _is(paths: Sized) -> str:
    return "is" if len(paths) == 1 else "are"
