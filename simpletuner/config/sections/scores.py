"""Figures that judge the gallery's pictures."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Scores"]


class Scores(Section):
    """Figures that judge the gallery's pictures."""

    evaluation_type: Literal["none", "clip"] = option("none")
    """`clip`: how well each picture fits its prompt by CLIP, 100 times the cosine of both embeddings, at least 0. Mean, least
    and greatest of each gallery are logged."""

    # Not its sibling patch14-336, which sees more: that one's main branch has pickled weights only, and those are never loaded.
    pretrained_evaluation_model_name_or_path: str = option(
        "openai/clip-vit-large-patch14", path="repository", when="evaluation_type=clip"
    )
    """The CLIP that scores: hub repository or local folder, with safetensors weights. Scores of different models do not
    compare."""
