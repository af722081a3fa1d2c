"""The ledger: of every picture found, whether it is used, and if not, why. found = used + excluded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner.data.whole import write_whole

__all__ = ["VERSION", "Exclusion", "Ledger", "Note", "write_ledger"]

VERSION = 1
"""Of the schema of `ledger.json`, which tools may rely on."""


@dataclass(frozen=True)
class Exclusion:
    """A picture that is not used."""

    file: str
    reason: str
    """Words to count by: "damaged", "no caption", "too small"."""
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """Something to know about a file that is used (or a folder that could not be searched)."""

    file: str
    note: str


@dataclass(frozen=True)
class Ledger:
    """The account of one set."""

    dataset: str
    found: int
    excluded: tuple[Exclusion, ...] = ()
    notes: tuple[Note, ...] = ()
    kind: str = "image"
    """The set's `dataset_type`: `image` is trained on, `eval` is judged by."""

    @property
    def name(self) -> str:
        """The set as lines for people name it: "cats", "held-out (eval)"."""
        return self.dataset if self.kind == "image" else f"{self.dataset} ({self.kind})"

    @property
    def used(self) -> int:
        """Pictures that are trained on, or judged by."""
        return self.found - len(self.excluded)

    @property
    def summary(self) -> str:
        """One line: "cats: 20 found = 17 used + 3 excluded (2 damaged, 1 no caption)"."""
        line = f"{self.name}: {self.found:,} found = {self.used:,} used + {len(self.excluded):,} excluded"
        counts = Counter(exclusion.reason for exclusion in self.excluded).most_common()
        return f"{line} ({', '.join(f'{count:,} {reason}' for reason, count in counts)})" if counts else line

    def as_dict(self) -> dict[str, Any]:
        """The set's part of `ledger.json`."""
        return {
            "dataset_type": self.kind,
            "found": self.found,
            "used": self.used,
            "excluded": [asdict(exclusion) for exclusion in self.excluded],
            "notes": [asdict(note) for note in self.notes],
        }


def write_ledger(path: Path, ledgers: Iterable[Ledger]) -> None:
    """Write `ledger.json`, whole or not at all."""
    document = {"version": VERSION, "datasets": {ledger.dataset: ledger.as_dict() for ledger in ledgers}}
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # A file's name may hold bytes that are no UTF-8. Python keeps them as lone surrogates, whose backslash form
    # (\udcff) is also how JSON writes them.
    write_whole(path, text.encode("utf-8", "backslashreplace") + b"\n")
