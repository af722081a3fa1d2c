"""What is saved, and where a run goes on."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Checkpointing"]


class Checkpointing(Section):
    """What is saved, and where a run goes on."""

    output_dir: str = option("output", level="essential", path="output")
    """Folder of the run: checkpoints, gallery, result, caches without a folder of their own."""

    checkpoint_step_interval: int = option(500, ge=0, level="essential", also=("checkpointing_steps",))
    """Save every so many optimiser steps; 0 saves only at the end."""

    checkpoints_total_limit: int = option(5, ge=0)
    """Checkpoints that are kept; an old one goes only after the new one is whole. 0 keeps all."""

    resume_from_checkpoint: str = option("latest", empty=True)
    """`latest`, the name of a checkpoint, or a path. "" starts afresh (and needs an unused `output_dir`)."""
