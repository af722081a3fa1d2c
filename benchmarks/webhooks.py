"""A training step's time with a webhook that hangs and without one, in turns within one run of the real trainer.

The endpoint takes each request and never answers. Every step is a log point here, and after every chunk of steps a preview of
a megabyte and a picture are told: far more than a run tells. Wall time, since waiting is what is looked for. At last: how long
the run's end waits for that endpoint.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from common import Figure, arguments, made_run, scratch, tell
from step import Group, made_batch

from simpletuner.config.webhooks import Endpoint
from simpletuner.data.samples import Batch, Cursor
from simpletuner.events import Event, Painted, Previewed
from simpletuner.examples.tiny import build_model
from simpletuner.families import load as load_family
from simpletuner.reporting.outbox import Patience
from simpletuner.reporting.webhooks import Webhook
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning


@contextmanager
def hanging() -> Iterator[str]:
    """The address of a server that takes whatever comes and says nothing."""
    listening = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def take() -> None:
        while True:
            try:
                connections.append(listening.accept()[0])
            except OSError:
                return

    threading.Thread(target=take, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    for one in (listening, *connections):
        one.close()


@dataclass
class Turns:
    """The trainer's stream and its watcher: chunks of steps with the webhook told, and without, by turns."""

    batch: Batch
    webhook: Webhook
    picture: Path
    rounds: int
    chunk: int
    wall_ms: dict[str, list[float]] = field(default_factory=lambda: {"with": [], "without": []})
    """Of one step."""
    is_told: bool = False

    def __call__(self, event: Event) -> None:
        if self.is_told:
            self.webhook(event)

    def groups(self, cursor: Cursor) -> Generator[Group, None, None]:
        for turn in range(-1, self.rounds):  # the first turn warms up
            order = ("with", "without") if turn % 2 else ("without", "with")
            for name in order:
                self.is_told = name == "with"
                began_s = time.perf_counter()
                for _ in range(self.chunk):
                    yield Group([self.batch], Cursor())
                self(Previewed(os.urandom(2**20), "cat", "a cat", 1, 5, 20))
                self(Painted(self.picture, "cat", "a cat", 1))
                if turn >= 0:
                    self.wall_ms[name].append((time.perf_counter() - began_s) * 1e3 / self.chunk)


def main() -> None:
    asked = arguments(__doc__, rounds=60, chunk=10, batch=1)
    with scratch() as folder, hanging() as url:
        build_model("sana", folder / "model")
        run = made_run(folder / "model", folder / "out", log_step_interval=1, lora_dropout=0.0, gradient_checkpointing=False)
        (folder / "picture.png").write_bytes(os.urandom(2**20))
        family = load_family(run)
        patience = Patience()
        webhook = Webhook(Endpoint("raw", url, level="debug"), run="benchmark", patience=patience)
        turns = Turns(made_batch(family, asked.batch), webhook, folder / "picture.png", asked.rounds, asked.chunk)
        denoiser = family.load_denoiser()
        tuning = build_tuning(family, denoiser, run)
        with Engine(run) as engine:
            Trainer(run, engine, family, denoiser, tuning, turns, [], turns, steps=1_000_000).fit()
        began_s = time.perf_counter()
        webhook.close()
        webhook.wait()
        closing_s = time.perf_counter() - began_s
    pairs = zip(turns.wall_ms["with"], turns.wall_ms["without"], strict=True)
    figures = [
        *(Figure(f"a step, {name} a webhook that hangs", median(ms), "ms") for name, ms in turns.wall_ms.items()),
        Figure("a step: with / without", median(a / b for a, b in pairs), "", most=1.03),
        Figure("the end of a run waits for it", closing_s, "s", most=patience.closing_s + 1),
    ]
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
