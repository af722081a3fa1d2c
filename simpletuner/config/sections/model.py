"""What is trained."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Model"]


class Model(Section):
    """What is trained: the family, which of its checkpoints, and how much of it."""

    model_family: str = option(level="essential")
    """Architecture to train; one of the files in `simpletuner/families/`."""

    model_flavour: str | None = option(None, level="essential", also=("model_flavor",))
    """A named checkpoint of the family, e.g. `sana1.5-1.6b-1024`. A path in `pretrained_model_name_or_path` wins over it."""

    model_type: Literal["lora", "full"] = option("lora", level="essential")
    """`lora` trains a small adapter beside the frozen base; `full` trains every weight of the denoiser."""

    pretrained_model_name_or_path: str | None = option(None, level="essential", path="repository")
    """Hub repository or local folder in the diffusers layout. Unset: the flavour's own repository."""

    revision: str | None = option(None)
    """Branch, tag or commit of the hub repository."""

    variant: str | None = option(None)
    """Weight-file variant of the repository, e.g. `fp16` for `*.fp16.safetensors`."""
