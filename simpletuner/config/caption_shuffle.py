"""What `caption_shuffle` of a dataset may say."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["CaptionShuffle"]


class CaptionShuffle(Section):
    """Variants of a caption, its tags in another order."""

    enable: bool = option(True)
    """Whether captions are shuffled at all."""

    count: int = option(1, ge=1)
    """Variants of each caption. Each is a prompt of its own in the text cache."""

    seed: int = option(0)
    """Other orders. Not the run's `seed`, whose change would encode everything afresh."""

    split_on: Literal["comma", "space", "period"] = option("comma")
    """What stands between two tags."""

    position_start: int = option(0, ge=0)
    """So many tags stay in front, in their order."""

    include_original: bool = option(True)
    """Whether the caption as it is written is an alternative too."""
