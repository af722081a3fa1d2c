"""The core options, a file for each section. `SECTIONS` maps the attribute of `Run` to its class."""

from __future__ import annotations

from simpletuner.config.options import Section
from simpletuner.config.sections.adapter import Adapter
from simpletuner.config.sections.checkpointing import Checkpointing
from simpletuner.config.sections.data import Data
from simpletuner.config.sections.ema import Ema
from simpletuner.config.sections.eval_loss import EvalLoss
from simpletuner.config.sections.flow import Flow
from simpletuner.config.sections.hub import Hub
from simpletuner.config.sections.kernels import Kernels
from simpletuner.config.sections.memory import Memory
from simpletuner.config.sections.model import Model
from simpletuner.config.sections.objective import Objective
from simpletuner.config.sections.optimizer import Optimizer
from simpletuner.config.sections.precision import Precision
from simpletuner.config.sections.previews import Previews
from simpletuner.config.sections.reporting import Reporting
from simpletuner.config.sections.scores import Scores
from simpletuner.config.sections.trackers import Trackers
from simpletuner.config.sections.training import Training
from simpletuner.config.sections.validation import Validation

__all__ = [
    "SECTIONS",
    "Adapter",
    "Checkpointing",
    "Data",
    "Ema",
    "EvalLoss",
    "Flow",
    "Hub",
    "Kernels",
    "Memory",
    "Model",
    "Objective",
    "Optimizer",
    "Precision",
    "Previews",
    "Reporting",
    "Scores",
    "Trackers",
    "Training",
    "Validation",
]

SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "adapter": Adapter,
    "training": Training,
    "optimizer": Optimizer,
    "ema": Ema,
    "precision": Precision,
    "memory": Memory,
    "kernels": Kernels,
    "flow": Flow,
    "objective": Objective,
    "data": Data,
    "checkpointing": Checkpointing,
    "validation": Validation,
    "eval_loss": EvalLoss,
    "previews": Previews,
    "scores": Scores,
    "reporting": Reporting,
    "trackers": Trackers,
    "hub": Hub,
}
