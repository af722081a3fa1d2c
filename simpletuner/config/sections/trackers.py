"""Programs that draw a run's figures and keep its pictures."""

from __future__ import annotations

from pydantic import field_validator

from simpletuner.config.options import Section, option

__all__ = ["TRACKERS", "Trackers"]

TRACKERS = ("tensorboard", "wandb")
"""What `report_to` may name, besides `none`."""
OF_WANDB = "report_to=wandb|tensorboard,wandb"


class Trackers(Section):
    """Programs that draw a run's figures and keep its pictures. `metrics.jsonl` is written whatever is chosen."""

    report_to: str = option("none", level="essential")
    """`wandb` (Weights & Biases), `tensorboard`, both by comma, or `none`. Where wandb is not logged in, it keeps the run
    offline under `<output_dir>/logs/`, to be sent later by `wandb sync`; nothing ever waits at a prompt."""

    tracker_project_name: str = option("simpletuner", when=OF_WANDB)
    """The tracker's project in which the run is kept."""

    tracker_run_name: str | None = option(None, when=OF_WANDB)
    """The run's name there. Unset: the name of `output_dir`'s last folder."""

    @field_validator("report_to")
    @classmethod
    def _known(cls, written: str) -> str:
        """In one spelling: by name, without spaces. Raises ValueError for a name that is none, or `none` beside another."""
        names = sorted({name.strip().lower() for name in written.split(",") if name.strip()})
        listed = f"{', '.join(TRACKERS)}, several by comma, or none"
        if unknown := [name for name in names if name not in (*TRACKERS, "none")]:
            raise ValueError(f"There is no tracker {' or '.join(unknown)} here. It takes {listed}.")
        if "none" in names and len(names) > 1:
            raise ValueError("none and a tracker contradict each other.")
        return ",".join(names) or "none"

    @property
    def trackers(self) -> tuple[str, ...]:
        """The chosen ones."""
        return tuple(name for name in TRACKERS if name in self.report_to.split(","))
