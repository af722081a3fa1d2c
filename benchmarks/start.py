"""From the command to the first step, with warm caches: CPU seconds and wall seconds, and what the imports take of them.

The whole command line runs on a tiny Sana, 24 pictures and a full cache, without a gallery, until its first step is logged.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from common import Figure, arguments, scratch, tell
from PIL import Image

from simpletuner.examples.tiny import build_model

PICTURES = 24
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "simpletuner", "numpy", "PIL", "pydantic", "rich")


def prepare(folder: Path) -> None:
    """A model, pictures and a configuration."""
    build_model("sana", folder / "model")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels_HWC = rng.integers(0, 255, (200, 220, 3), np.uint8)
        Image.fromarray(pixels_HWC).save(folder / "pictures" / f"a_cat_{number}.png")
    config = {
        "model_family": "sana", "pretrained_model_name_or_path": "model", "lora_rank": 4, "max_train_steps": 1,
        "train_batch_size": 2, "log_step_interval": 1, "data_backend_config": "data.json", "output_dir": "out",
    }  # fmt: skip
    dataset = {"id": "cats", "instance_data_dir": "pictures", "resolution": 128, "crop": True, "cache_dir_vae": "cache"}
    (folder / "config.json").write_text(json.dumps(config))
    text = {"id": "text", "dataset_type": "text_embeds", "cache_dir": "cache"}
    (folder / "data.json").write_text(json.dumps([dataset, text]))


def started(folder: Path, *options: str) -> tuple[float, float, str]:
    """(CPU seconds, wall seconds) until the first step is logged, and what the command said on stderr."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    metrics = folder / "out" / "metrics.jsonl"
    began_s = time.perf_counter()
    with (folder / "stderr.txt").open("w") as stderr:
        command = [sys.executable, *options, "-m", "simpletuner", "train", "--config_file", "config.json"]
        process = psutil.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr)
        while not (metrics.is_file() and '"loss"' in metrics.read_text()):
            if process.poll() is not None:
                raise SystemExit((folder / "stderr.txt").read_text())
            time.sleep(0.005)
        times, wall_s = process.cpu_times(), time.perf_counter() - began_s
        process.wait()
    return times.user + times.system, wall_s, (folder / "stderr.txt").read_text()


def import_s(said: str) -> dict[str, float]:
    """Seconds in the modules of each package, from `-X importtime`."""
    seconds: dict[str, float] = {}
    for own_us, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", said, re.MULTILINE):
        package = module.partition(".")[0]
        package = package if package in HEAVY else "others"
        seconds[package] = seconds.get(package, 0.0) + int(own_us) / 1e6
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def main() -> None:
    asked = arguments(__doc__, rounds=5)
    with scratch() as folder:
        prepare(folder)
        started(folder)  # fills the caches
        runs = [started(folder) for _ in range(asked.rounds)]
        imports = import_s(started(folder, "-X", "importtime")[2])
    cpu_s, wall_s = min(run[0] for run in runs), min(run[1] for run in runs)
    loaded = [line for line in runs[-1][2].splitlines() if line.startswith("encoding ")]
    figures = [
        Figure("start to the first step, caches warm: CPU", cpu_s, "CPU s", most=5),
        Figure("start to the first step, caches warm: wall clock", wall_s, "s", most=5),
        Figure("encoders loaded with a full cache", len(loaded), "", most=0),
        *(Figure(f"of it, traced: importing {package}", seconds, "s") for package, seconds in imports.items()),
    ]
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
