"""Saving and memory, for information: what a checkpoint costs, and the most memory that a run takes.

The tiny Sana is too small to say much of either; the figures are here to be compared with later ones of the same machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from common import Figure, arguments, least_cpu_s, made_run, say, scratch, tell
from start import prepare

from simpletuner.families import load as load_family
from simpletuner.training.checkpoints import Checkpoints
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning

PEAK = """
import resource
from simpletuner.cli import main
main({words!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class NoBatches:
    """Nothing is trained here."""

    def groups(self, cursor: object) -> object:
        raise AssertionError("a checkpoint needs no batch")


def saving(model: Path, folder: Path, model_type: str, rounds: int) -> list[Figure]:
    run = made_run(model, folder, model_type=model_type)
    family = load_family(run)
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, run)
    with Engine(run) as engine:
        job = Checkpoints(run, {"data_backend_config": []})
        trainer = Trainer(run, engine, family, denoiser, tuning, NoBatches(), [job], say, steps=10)  # type: ignore[arg-type]

        def save() -> None:
            trainer.state.step += 1
            job.run(trainer)

        for parameter in tuning.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        seconds = least_cpu_s({"save": save}, rounds)["save"]
    saved = sum(tensor.nbytes for tensor in tuning.weights().values()) * 3 / 2**20
    return [Figure(f"checkpoint of a {model_type} run, {saved:.1f} MiB with moments", seconds * 1e3, "CPU ms")]


def peak_mib(folder: Path, command: str) -> float:
    """Of a process that runs one command of ours."""
    words = [command, "--config_file", "config.json"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(words=words)],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return float(done.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    asked = arguments(__doc__, rounds=4)
    with scratch() as folder:
        prepare(folder)
        figures = [
            *saving(folder / "model", folder / "lora", "lora", asked.rounds),
            *saving(folder / "model", folder / "full", "full", asked.rounds),
            Figure("peak memory of `train`, caches empty", peak_mib(folder, "train"), "MiB"),
        ]
        config = json.loads((folder / "config.json").read_text()) | {"output_dir": "again"}
        (folder / "config.json").write_text(json.dumps(config))
        figures.append(Figure("peak memory of `train`, caches full", peak_mib(folder, "train"), "MiB"))
        figures.append(Figure("peak memory of `check`", peak_mib(folder, "check"), "MiB"))
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
