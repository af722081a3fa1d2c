"""How much each sample's loss counts, where that is learned while training. Fixed weights are the family's `weight`.

Shape letters:  B batch,  H W latent rows and columns,  K buckets of log-SNR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["AdaptiveWeights"]

BUCKETS = 300
RANGE = 10.0
"""Buckets lie evenly over log-SNR in [-RANGE, RANGE]; what is beyond belongs to the first or the last."""
KEPT = 0.99
LEAST, MOST = 1e-7, 1e7


class AdaptiveWeights:
    """Each noise level counts as if its loss were 1: the weight is one over the running mean loss of its bucket.

    Losses are noted as they come and taken in once an optimiser step, summed over all ranks, so every rank weighs alike.
    Nothing here is read back by the host. Source: the authors' trainer of Stable Cascade ("AdaptiveLossWeight").
    """

    def __init__(self, log_snr: Callable[[Tensor], Tensor], device: str = "cpu") -> None:
        """`log_snr` gives a time's log-SNR: (B,) -> (B,)."""
        self._log_snr = log_snr
        self._edges_K = torch.linspace(-RANGE, RANGE, BUCKETS - 1, device=device)
        self._mean_K = torch.ones(BUCKETS, device=device)
        self._noted_2K = torch.zeros(2, BUCKETS, device=device)
        """Sum and number of the losses since the last `update`."""

    def weight(self, t_B: Tensor) -> Tensor:
        """(B,) float32."""
        return (1 / self._mean_K[self._bucket(t_B)]).clamp(LEAST, MOST)

    def note(self, t_B: Tensor, loss_B: Tensor, mask_B1HW: Tensor | None = None) -> None:
        """Remember unweighted losses. One that an empty mask made says nothing of how hard its time is."""
        counts_B = torch.ones_like(t_B) if mask_B1HW is None else mask_B1HW.flatten(1).any(1)
        # By comparison, not by index_add: that adds in no fixed order on a GPU.
        is_in_BK = (self._bucket(t_B)[:, None] == torch.arange(BUCKETS, device=t_B.device)).float()
        loss_B = loss_B.detach().float()
        self._noted_2K += torch.stack([loss_B, counts_B.to(loss_B)]) @ is_in_BK

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take in what was noted. `total` sums a tensor over all ranks."""
        sum_K, count_K = total(self._noted_2K)
        new_K = torch.lerp(sum_K / count_K.clamp(min=1), self._mean_K, KEPT)
        self._mean_K = torch.where(count_K > 0, new_K, self._mean_K)
        self._noted_2K = torch.zeros_like(self._noted_2K)

    def as_json(self) -> list[float]:
        """The running means, exactly."""
        return self._mean_K.tolist()

    def restore(self, means: Sequence[float]) -> None:
        """Weigh as when `as_json` was asked."""
        self._mean_K = torch.tensor(means, dtype=torch.float32, device=self._mean_K.device)

    def _bucket(self, t_B: Tensor) -> Tensor:
        return torch.searchsorted(self._edges_K, self._log_snr(t_B).to(self._edges_K).contiguous())
