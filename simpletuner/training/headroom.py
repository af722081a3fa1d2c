"""How near training comes to the end of the card's memory, and the warning of it while there is time to act."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Headroom"]

TIGHT = 0.95
"""Share of the card from which little that comes besides training still fits."""


class Device(Protocol):
    """What the engine knows of its device; None where nothing is counted."""

    def peak_memory_gib(self) -> float | None:
        """The most that tensors took so far."""

    def memory_gib(self) -> float | None:
        """What there is."""


class Headroom:
    """Watches this process's device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._was_told = False

    def share(self) -> float | None:
        """The peak so far, as a share of the card."""
        peak_gib, all_gib = self._device.peak_memory_gib(), self._device.memory_gib()
        return peak_gib / all_gib if peak_gib is not None and all_gib else None

    def warning(self) -> str:
        """What is to be said now, once in a run; else ""."""
        share = self.share()
        if self._was_told or share is None or share <= TIGHT:
            return ""
        self._was_told = True
        return (
            f"Training has taken {self._device.peak_memory_gib():.1f} GiB of the card's {self._device.memory_gib():.1f} "
            f"({share:.0%}): a gallery, or a larger picture, may not fit beside it."
        )
