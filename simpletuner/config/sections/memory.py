"""Memory against speed."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Memory"]


class Memory(Section):
    """Trading speed for memory."""

    gradient_checkpointing: bool = option(True, level="essential")
    """Recompute block activations in the backward pass instead of keeping them: much less memory, about a third slower."""

    gradient_checkpointing_interval: int = option(1, ge=1, when="gradient_checkpointing=true")
    """Recompute every n-th block only: 1 all, 2 half of them, 3 a third. Memory and speed lie in between."""
