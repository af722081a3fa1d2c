"""What pictures of the gallery are called, and what they say of themselves in their metadata."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from simpletuner.events import Weights
from simpletuner.families.base import Shot

__all__ = ["Picture", "facts", "file_name", "file_stem", "is_painted", "pictures_in"]

NAME_BYTES = 100
"""Longest nickname in a file name; file systems allow 255 bytes for the whole."""
NAME = re.compile(r"step_\d+_.*_(\d+)_\d+x\d+\.png", re.DOTALL)
NEEDED = {"weights", "nickname", "prompt", "step"}
"""Without these in its metadata a picture is not one of ours."""


def file_name(shot: Shot, step: int, weights: Weights = "trained") -> str:
    """`step_<step>_<nickname>_<index>_<W>x<H>.png`, safe on every file system; the average's are named `<nickname>_ema`."""
    return f"step_{step}_{file_stem(shot, weights)}.png"


def file_stem(shot: Shot, weights: Weights = "trained") -> str:
    """The same without the step: `<nickname>_<index>_<W>x<H>`.

    Nicknames that become the same are still told apart by their index.
    """
    nickname = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", shot.nickname)).strip("._")
    nickname = nickname.encode()[:NAME_BYTES].decode(errors="ignore") or "prompt"
    nickname += "_ema" if weights == "ema" else ""
    return f"{nickname}_{shot.index}_{shot.width_px}x{shot.height_px}"


def facts(shot: Shot, step: int, weights: Weights = "trained") -> dict[str, str]:
    """What the picture says of itself in its metadata."""
    strength = {} if shot.adapter_strength == 1 else {"adapter_strength": f"{shot.adapter_strength:g}"}
    return {
        "weights": weights,
        "nickname": shot.nickname,
        "prompt": shot.prompt,
        "negative_prompt": shot.negative,
        "seed": str(shot.seed),
        "guidance": str(shot.guidance),
        "inference_steps": str(shot.steps),
        "step": str(step),
        **strength,
        **dict(shot.settings),
    }


def is_painted(path: Path, shot: Shot, step: int, weights: Weights = "trained") -> bool:
    """Whether `path` holds this very picture, by its metadata."""
    found = _read(path)
    return found is not None and found[1] == facts(shot, step, weights)


@dataclass(frozen=True)
class Picture:
    """A picture that lies in a folder of the gallery."""

    path: Path
    index: int
    """The n-th prompt."""
    size_WH: tuple[int, int]
    """In pixels."""
    texts: dict[str, str]
    """Its metadata."""

    @property
    def step(self) -> int:
        """How many optimiser steps its weights had taken."""
        return int(self.texts["step"])


def pictures_in(folder: Path) -> list[Picture]:
    """The pictures of `folder` that a gallery wrote, by prompt, size and step; other files are passed over."""
    pictures = []
    for path in folder.glob("step_*.png"):
        name, found = NAME.fullmatch(path.name), _read(path)
        if name and found and found[1].keys() >= NEEDED and found[1]["step"].isdecimal():
            pictures.append(Picture(path, int(name[1]), *found))
    return sorted(pictures, key=lambda one: (one.index, one.size_WH, one.step, one.path.name))


def _read(path: Path) -> tuple[tuple[int, int], dict[str, str]] | None:
    """Size and metadata of a picture; None if it is not there, or is none."""
    try:
        with Image.open(path) as image:
            return image.size, {str(key): value for key, value in image.info.items()}
    except (OSError, ValueError):  # damaged; or texts longer than Pillow reads
        return None
