"""Runs the command line in forks of one process that has imported everything: a start costs milliseconds, not seconds.

Each line on stdin is a JSON object {words, folder, environment, files}; the answer is the exit code. A fork does what
`python -m simpletuner` does after its imports; tests of imports, and of what libraries read then, start Python.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODULES = (
    *("accelerate", "simpletuner.app", "simpletuner.text_cache", "simpletuner.training.lycoris"),
    *("diffusers.pipelines.sana.pipeline_sana", "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"),
    *("diffusers.pipelines.stable_cascade.pipeline_stable_cascade_prior",),
    *("diffusers.pipelines.stable_cascade.pipeline_stable_cascade", "diffusers.models.autoencoders.autoencoder_dc"),
    *(
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
        "transformers.models.gemma2.modeling_gemma2",
    ),
)


class Forks:
    """The process that forks, started at its first use."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, words: tuple[str, ...], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of `simpletuner WORDS` in `folder`."""
        if self._server is None:
            command = [sys.executable, __file__]
            root = str(Path(__file__).parents[2])
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**environment, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
            )
        files = [folder / f".{name}-{os.getpid()}" for name in ("stdout", "stderr")]
        asked = {"words": words, "folder": str(folder), "environment": environment, "files": list(map(str, files))}
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        said = [file.read_text(errors="backslashreplace") for file in files]
        for file in files:
            file.unlink()
        return code, said[0], said[1]

    def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.communicate()


def serve() -> None:
    """Fork for each line; return in the forks only, ready to run the command."""
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # what was imported stays: each of a fork's collections would search it, for a third of a second
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            become(asked)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()
    sys.exit()


def become(asked: dict[str, Any]) -> None:
    """Stand where a fresh process would: its folder, environment, words, and files for what it says."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["simpletuner", *asked["words"]]
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, path in enumerate(asked["files"], start=1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)


if __name__ == "__main__":
    from simpletuner.networks.libraries import import_model_libraries

    import_model_libraries()
    serve()
    from simpletuner.cli import main

    raise SystemExit(main())
