"""How an answer of the denoiser is judged, and what makes its task harder."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Objective"]

ROBUST = "loss_type=huber|smooth_l1"


class Objective(Section):
    """How the denoiser's answer is judged, and noise beyond what it is asked to find."""

    loss_type: Literal["l2", "huber", "smooth_l1"] = option("l2")
    """How a difference d counts: `l2` d squared; `huber` 2c (sqrt(d^2 + c^2) - c); `smooth_l1` 2 (sqrt(d^2 + c^2) - c). The
    last two grow with |d| only where it is well above c (`huber_c`), so that outliers among the pictures pull less."""

    huber_c: float = option(0.1, gt=0, when=ROBUST)
    """Where the loss turns from squares to absolute values, in units of the latents; smaller is more robust."""

    huber_schedule: Literal["constant", "exponential", "snr"] = option("constant", when=ROBUST)
    """What stands for c at noise level t, with c = `huber_c`: `constant` c everywhere; `exponential` c^t and `snr`
    (1 - c)(1 - t)^2 + c go from 1 on clean samples (t = 0, nearly squares) to c on pure noise (t = 1)."""

    input_perturbation: float = option(0.0, ge=0, level="experimental")
    """Share g of further noise: the noisy latent is made with noise + g x normal, while the answer is held to the plain noise.
    Makes the model forgive its own errors in sampling; 0.1 is usual. Regularisation samples are perturbed alike: an adapter
    is held to the base's answer to the same latent."""

    input_perturbation_steps: int = option(0, ge=0, level="experimental", when="input_perturbation>0")
    """Fade `input_perturbation` linearly to 0 over so many optimiser steps; 0 keeps it."""

    masked_loss_probability: float = option(1.0, ge=0, le=1)
    """How often a sample is trained by its mask alone, drawn each time it comes; otherwise by the whole picture. Of sets with
    `conditioning_data`."""
