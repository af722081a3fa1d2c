"""Weights & Biases: online where the user is logged in, else offline in the run's folder. Never a prompt, never a long wait."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from simpletuner.config.sections import Trackers
from simpletuner.events import Event, Measured, Notice, Painted, RunFailed, RunFinished, RunStarted, Stepped, Tell
from simpletuner.reporting.trackers import figures, is_there, tag
from simpletuner.reporting.waiting import told_if_long

__all__ = ["WandbTracker"]

ID = "wandb-run-id"
"""File in the folder of logs that names the tracker's run, so that a resumed one goes on in it."""
REACH_S = 30.0
"""How long the start waits for an answer before it goes on offline."""
FINISH_S = 120.0
"""How long the end waits for what is not yet sent; it stays in the folder, for `wandb sync`."""


class WandbTracker:
    """The sink of one run of wandb, which writes and sends from a process of its own.

    It opens where training starts and is closed where it ends, well or not.
    """

    def __init__(self, options: Trackers, logs: Path, config: Mapping[str, Any], tell: Tell) -> None:
        """`logs` is the folder for its files, `config` the resolved configuration; `tell` hears where the run can be seen."""
        self._options = options
        self._logs = logs
        self._config = config
        self._tell = tell
        self._run: Any = None

    def __call__(self, event: Event) -> None:
        """Log what an event holds to be drawn."""
        if isinstance(event, RunStarted):
            self._run = self._open()
        if self._run is None:  # not begun, or turned off by WANDB_MODE
            return
        if isinstance(event, Stepped | Measured):
            self._log(event.step, figures(event))
        elif isinstance(event, Painted) and is_there(event):
            self._show(event)
        elif isinstance(event, RunFinished | RunFailed):
            self._close(_exit_code(event))

    def __str__(self) -> str:
        return "The tracker wandb"

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # By a figure of our own: wandb's count of steps never goes back, so that what a resumed run tells of steps that it
        # takes again would be dropped.
        self._run.log({**values, "step": step})

    def _show(self, event: Painted) -> None:
        import wandb

        caption = f"{event.nickname}: {event.prompt}"
        self._log(event.step, {tag(event): wandb.Image(str(event.path), caption=caption)})

    def _open(self) -> Any:
        """The run of wandb, begun or gone on in, or None."""
        # Else it reports on itself as well, and waits for its server's answer to that when Python exits (wandb 0.31).
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._logs.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "disabled":
            self._tell(Notice("wandb: WANDB_MODE is disabled, so the figures are in metrics.jsonl alone."))
            return None
        wandb.setup(settings=_settings())  # else the login below prints
        why = f"WANDB_MODE is {mode}" if mode != "online" else _offline_reason()
        run = None
        if not why:
            try:
                with told_if_long(self._tell, f"wandb: waiting for its server, at most {REACH_S:.0f} s."):
                    run = self._begin("online")
            except wandb.Error as error:
                why = f"it cannot be reached: {error}"
                wandb.teardown()  # its process keeps the run's name in use (wandb 0.31)
        if run is None:
            run = self._begin("offline")
            words = f"wandb keeps this run offline: {why}. To send it afterwards: wandb sync {Path(run.dir).parent}"
            self._tell(Notice(words))
        else:
            self._tell(Notice(f"wandb: {run.url}"))
        run.define_metric("*", step_metric="step")
        return run

    def _begin(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        return wandb.init(
            project=self._options.tracker_project_name,
            name=self._options.tracker_run_name,
            id=_run_id(self._logs / ID),
            resume="allow",
            dir=str(self._logs),
            config=dict(self._config),
            mode=mode,
            settings=_settings(),
        )

    def _close(self, exit_code: int) -> None:
        """End the run and wandb's process, within bounds; what could not be sent stays in the folder."""
        import wandb

        run, self._run = self._run, None
        text = (
            f"wandb: sending what is left, at most {FINISH_S:.0f} s; `wandb sync {Path(run.dir).parent}` sends all that is not."
        )
        with told_if_long(self._tell, text):
            run.finish(exit_code)
            wandb.teardown()  # else Python waits for it when it exits, in silence


def _exit_code(event: RunFinished | RunFailed) -> int:
    """As wandb counts: 255 is a run that its user stopped."""
    if isinstance(event, RunFinished):
        return 0
    return 255 if event.is_stopped else 1


def _settings() -> Any:
    """Nothing is printed, and nothing is kept but what we tell it."""
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,  # the command line, in which a secret may stand
        init_timeout=REACH_S,
        finish_timeout=FINISH_S,
    )


def _offline_reason() -> str:
    """Why the run cannot be sent, or "" if an account is known. Asks nobody."""
    import wandb

    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        return f"the login is not valid ({error})"
    return "" if known else "nobody is logged in (`wandb login` does that)"


def _run_id(path: Path) -> str:
    """What the run is called by wandb, from the run's folder or made up."""
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
