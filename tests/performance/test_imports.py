"""What a start loads, by package: seconds are made of these."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import simpletuner

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "safetensors"}
LISTED = """
import sys
from simpletuner.cli import main
code = main(sys.argv[1:])
foreign = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
print(code, *sorted(foreign), len(sys.modules), file=sys.stderr)
"""


def loaded(*words: str, cwd: Path) -> tuple[int, set[str], int]:
    """Exit code of a command, the packages it imported beside the standard library, and the number of modules."""
    command = [sys.executable, "-c", LISTED, *words]
    environment = {"PYTHONPATH": str(Path(simpletuner.__file__).parents[1]), "PATH": ""}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=True)
    code, *packages, count = done.stderr.splitlines()[-1].split()
    return int(code), set(packages), int(count)


def test_help_loads_nothing_but_us(tmp_path: Path) -> None:
    code, packages, count = loaded("--help", cwd=tmp_path)
    assert code == 0
    foreign = {package for package in packages if not package.startswith(("_", "simpletuner"))}
    assert foreign <= {"sitecustomize", "distutils-precedence"}, foreign
    assert count < 150


def test_a_config_error_is_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_family": "sana", "learning_rat": 1}')
    code, packages, _ = loaded("train", cwd=tmp_path)
    assert code == 2
    assert not packages & HEAVY
    assert "numpy" not in packages
    assert "pydantic" in packages, "nothing was checked"


def test_the_list_of_options_loads_nothing_heavy(tmp_path: Path) -> None:
    code, packages, _ = loaded("train", "--help", cwd=tmp_path)
    assert code == 0
    assert not packages & HEAVY
