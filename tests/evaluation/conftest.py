"""Galleries of fakes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.run import Run
from simpletuner.evaluation.gallery import Gallery
from simpletuner.families.base import Shot
from tests.evaluation.gallery_fakes import SHOT, FakePrompts


@pytest.fixture
def gallery(make_run: Callable[..., Run], tmp_path: Path) -> Callable[..., Gallery]:
    def of(shots: tuple[Shot, ...] = (SHOT,), **options: Any) -> Gallery:
        run = make_run("sana", **{"output_dir": str(tmp_path), "validation_step_interval": 10, **options})
        return Gallery(run, shots, FakePrompts(), steps_per_epoch=Fraction(5, 2))  # type: ignore[arg-type]

    return of
