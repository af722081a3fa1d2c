"""How the model was judged, as one line and as one row: what console and metrics file say of a `Measured`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from simpletuner.events import Measured

__all__ = ["TENTHS", "measured_line", "measured_row", "tenth", "tenth_name"]

TENTHS = 10
"""Equal parts of time, t from 0 to 1, whose losses are told apart."""
BESIDE = {"eval_loss_ema": "average", "eval_loss_base": "base"}
"""Figures that stand in brackets behind the trained weights' own, with their words."""
PAINTERS = {"clip_score/ema": " of the average", "clip_score/base": " of the base"}
"""Whose pictures a score judges, by what its figures begin with; others are the trained weights' own."""


def measured_line(event: Measured) -> str:
    """`eval loss at step 100: 0.1234 (base 0.1500); cats 0.1100 (base 0.1600)`, `CLIP score at step 100: mean 28.13, ...`."""
    if event.kind == "clip":
        figures = [f"{name.rpartition('/')[2]} {value:.2f}" for name, value in event.figures.items()]
        whose = next((words for name, words in PAINTERS.items() if f"{name}/mean" in event.figures), "")
        return f"CLIP score{whose} at step {event.step}: {', '.join(figures)}"
    sets = [name.partition("/")[2] for name in event.figures if name.startswith("eval_loss/")]
    parts = [_with_others(event.figures, ""), *(f"{name} {_with_others(event.figures, f'/{name}')}" for name in sets)]
    return f"eval loss at step {event.step}: {'; '.join(parts)}"


def _with_others(figures: Mapping[str, float], of: str) -> str:
    others = [f"{word} {figures[name + of]:.4f}" for name, word in BESIDE.items() if name + of in figures]
    own = f"{figures[f'eval_loss{of}']:.4f}"
    return f"{own} ({', '.join(others)})" if others else own


def measured_row(event: Measured) -> dict[str, Any]:
    """One object: the figures by name, and `curves` with a list of pairs for each."""
    return {
        "kind": event.kind,
        "step": event.step,
        **event.figures,
        "curves": {name: [list(pair) for pair in curve] for name, curve in event.curves.items()},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def tenth(t: float) -> int:
    """Of the parts that time is cut into; pure noise belongs to the last."""
    return min(int(t * TENTHS), TENTHS - 1)


def tenth_name(nth: int) -> str:
    """ "0.0-0.1" """
    return f"{nth / TENTHS:.1f}-{(nth + 1) / TENTHS:.1f}"
