"""What is logged."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Reporting"]


class Reporting(Section):
    """What is logged, and how often."""

    log_step_interval: int = option(10, ge=1)
    """Report loss, learning rate, gradient norm and speed every so many optimiser steps."""

    log_level: Literal["debug", "info", "warning", "error"] = option("info")
    """How much the console tells."""
