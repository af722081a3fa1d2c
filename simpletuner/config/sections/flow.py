"""Which noise levels a flow-matching family trains on."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Flow"]


class Flow(Section):
    """Which noise levels are trained most (flow-matching families). Without a choice: logit-normal, then shifted."""

    flow_schedule_shift: float = option(3.0, gt=0, when="flow_schedule_auto_shift=false")
    """Push training towards noise (> 1: composition, colour) or towards detail (< 1): s' = shift s / (1 + (shift - 1) s)."""

    flow_schedule_auto_shift: bool = option(False)
    """Choose the shift by the size of each bucket (larger pictures, more noise) instead of `flow_schedule_shift`."""

    flow_use_uniform_schedule: bool = option(False)
    """Draw noise levels uniformly."""

    flow_use_beta_schedule: bool = option(False)
    """Draw noise levels from a Beta distribution."""

    flow_beta_schedule_alpha: float = option(2.0, gt=0, when="flow_use_beta_schedule=true")
    """First parameter of the Beta distribution; larger than the second leans towards noise."""

    flow_beta_schedule_beta: float = option(2.0, gt=0, when="flow_use_beta_schedule=true")
    """Second parameter of the Beta distribution; larger than the first leans towards detail."""

    flow_sigmoid_scale: float = option(1.0, gt=0, when="flow_use_uniform_schedule=false and flow_use_beta_schedule=false")
    """Width of the logit-normal: sigmoid(scale x normal)."""
