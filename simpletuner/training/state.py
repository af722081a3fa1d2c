"""Where a run stands. Beside weights and moments a resumed run needs no more than this: draws are keyed, not stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simpletuner.data.samples import Cursor

__all__ = ["TrainState"]


@dataclass
class TrainState:
    """What is done: optimiser steps, samples over all ranks, the place in the stream."""

    step: int = 0
    samples_seen: int = 0
    cursor: Cursor = field(default_factory=Cursor)

    @property
    def epoch(self) -> int:
        """The epoch that the next micro-batch belongs to, from 0."""
        return self.cursor.epoch

    def advance(self, after: Cursor, samples: int) -> None:
        """One optimiser step over `samples` samples was taken; the stream goes on at `after`."""
        self.step += 1
        self.samples_seen += samples
        self.cursor = after

    def as_json(self) -> dict[str, Any]:
        """Plain facts for `state.json`."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "cursor": {"epoch": self.cursor.epoch, "position": self.cursor.position},
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Stand where `facts`, made by `as_json`, say."""
        self.step = facts["step"]
        self.samples_seen = facts["samples_seen"]
        self.cursor = Cursor(**facts["cursor"], step=self.step)
