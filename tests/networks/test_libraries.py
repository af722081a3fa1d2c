"""What the libraries say at their import, and who hears it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import simpletuner


@pytest.mark.slow
def test_a_tiny_model_is_built_without_advice_to_install_what_is_not_needed(tmp_path: Path) -> None:
    """In a Python of its own: here everything is imported already."""
    command = [sys.executable, "-m", "simpletuner", "examples", "build-model", "stable_cascade", str(tmp_path / "model")]
    variables = {"PYTHONPATH": str(Path(simpletuner.__file__).parents[1]), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    assert [line for line in done.stderr.splitlines() if "stable_cascade_decoder_model_name_or_path" not in line] == [
        f'"pretrained_model_name_or_path": "{tmp_path / "model" / "stable-cascade-prior"}"'
    ]
