"""The quantile of the Beta distribution, which torch lacks: a table made once for each pair of parameters.

With t = sigmoid(z), the density of z is smooth for any parameters and logit(CDF) tends to straight lines at both ends,
so the table in these coordinates is accurate into both tails.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["beta_quantile"]

CELLS = 4096
NODES = 6  # Gauss-Legendre nodes in each cell: exact to the eleventh degree


@dataclass(frozen=True)
class Table:
    """Knots of z = logit(t) over w = logit(u), rising, with the slopes dz/dw there."""

    w: Tensor
    z: Tensor
    slope: Tensor


def beta_quantile(u_B: Tensor, alpha: float, beta: float) -> Tensor:
    """t with P(T <= t) = u for T ~ Beta(alpha, beta), to about nine digits."""
    table = make_table(alpha, beta)
    w_B = torch.logit(u_B.double().cpu())
    inside_B = w_B.clamp(table.w[0], table.w[-1])
    right_B = torch.searchsorted(table.w, inside_B).clamp(1, len(table.w) - 1)
    left_B = right_B - 1
    # Cubic Hermite between the knots, straight on beyond them.
    width_B = table.w[right_B] - table.w[left_B]
    s_B = (inside_B - table.w[left_B]) / width_B
    z_B = (
        (1 + 2 * s_B) * (1 - s_B) ** 2 * table.z[left_B]
        + s_B * (1 - s_B) ** 2 * width_B * table.slope[left_B]
        + s_B**2 * (3 - 2 * s_B) * table.z[right_B]
        - s_B**2 * (1 - s_B) * width_B * table.slope[right_B]
    )
    beyond_B = w_B - inside_B
    z_B = z_B + beyond_B * torch.where(beyond_B < 0, table.slope[0], table.slope[-1])
    return torch.sigmoid(z_B).to(u_B)


@lru_cache(maxsize=8)
def make_table(alpha: float, beta: float) -> Table:
    """Integrates the density of z = logit(t) from both ends, so that neither tail is a difference of near-equal numbers."""
    middle, spread = np.log(alpha / beta), np.sqrt(1 / alpha + 1 / beta)
    edges = np.linspace(middle - 10 * spread - 40 / alpha, middle + 10 * spread + 40 / beta, CELLS + 1)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = (edges[1] - edges[0]) / 2
    peak = log_density(middle, alpha, beta)  # keeps exp within range; it cancels below
    inner = (edges[:-1] + edges[1:])[:, None] / 2 + half * nodes
    mass = half * (np.exp(log_density(inner, alpha, beta) - peak) * weights).sum(1)
    # Below the first edge and above the last the density is e^(alpha z) and e^(-beta z) to the last digit.
    density = np.exp(log_density(edges, alpha, beta) - peak)
    below = np.cumsum(np.concatenate([[density[0] / alpha], mass]))
    above = np.cumsum(np.concatenate([[density[-1] / beta], mass[::-1]]))[::-1]
    known = (below > 1e-290) & (above > 1e-290)
    below, above, density = below[known], above[known], density[known]
    slope = below * above / (density * (below + above))  # dw/dz = p (1/F + 1/S), and F + S = 1
    return Table(*(torch.from_numpy(column) for column in (np.log(below) - np.log(above), edges[known], slope)))


def log_density(z: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Log of the unnormalised density of logit(T): sigmoid(z)^alpha sigmoid(-z)^beta."""
    return -alpha * np.logaddexp(0, -z) - beta * np.logaddexp(0, z)
