"""A user's working folder: a few pictures, a dataset file, a config. What the end-to-end tests start from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.e2e.forked import Forks
from tests.reporting.conftest import server as server  # a fixture of these tests too

SIZES = {"a_red_square": (160, 160), "a_wide_river": (256, 128), "a_tall_tower": (128, 256), "a_blue_dot": (200, 180)}


@dataclass
class Workspace:
    """A folder in which the command line is run as a user runs it."""

    folder: Path
    config: dict[str, Any]
    datasets: list[dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside the usual ones. With any, commands start Python afresh: libraries read theirs when they are imported."""
    forks: Forks | None = None
    """Where commands run; None starts Python for each."""

    def write(self) -> None:
        (self.folder / "config").mkdir(exist_ok=True)
        (self.folder / "config" / "config.json").write_text(json.dumps(self.config))
        (self.folder / "config" / "multidatabackend.json").write_text(json.dumps(self.datasets))

    def command(self, *words: str) -> list[str]:
        self.write()
        return [sys.executable, "-m", "simpletuner", *words]

    def run(self, *words: str, expect: int = 0) -> str:
        """Run a command to its end; what it said on stdout and stderr."""
        answer, said = self.ask(*words, expect=expect)
        return answer + said

    def ask(self, *words: str, expect: int = 0) -> tuple[str, str]:
        """The same, (stdout, stderr) apart."""
        command, variables = self.command(*words), {**environment(), **self.environment}
        if self.forks and not self.environment:
            code, answer, said = self.forks.run(words, self.folder, variables)
        else:
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=variables)
            code, answer, said = done.returncode, done.stdout, done.stderr
        assert code == expect, f"exit code {code}, not {expect}:\n{answer}\n{said}"
        return answer, said

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Run a command without waiting for it."""
        return subprocess.Popen(
            self.command(*words),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), **self.environment},
        )

    def losses(self, output: str = "output") -> dict[int, float]:
        """Step -> loss. Of two rows of a step the later one counts."""
        rows = map(json.loads, (self.folder / output / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["loss"] for row in rows if "kind" not in row}


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SIMPLETUNER_")}
    return {**own, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    own = Forks()
    yield own
    own.close()


@pytest.fixture
def workspace(tmp_path: Path, tiny_repo: Callable[[str], Path], forks: Forks) -> Workspace:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        image = Image.new("RGB", size, (40 * number, 200 - 30 * number, 90))
        ImageDraw.Draw(image).ellipse((20, 20, 90, 90), fill=(250, 40 * number, 10))
        image.save(pictures / f"{name}.png")
    config = {
        "model_family": "sana",
        "pretrained_model_name_or_path": str(tiny_repo("sana")),
        "lora_rank": 4,
        "lora_alpha": 8,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "max_train_steps": 6,
        "train_batch_size": 2,
        "log_step_interval": 1,
        "validation_prompt": "a red square",
        "validation_resolution": "128x128",
        "validation_num_inference_steps": 2,
    }
    datasets = [{"id": "pictures", "instance_data_dir": "pictures", "resolution": 128, "crop": True, "crop_style": "center"}]
    return Workspace(tmp_path, config, datasets, forks=forks)
