"""What the answer is held to: one number for each sample, so that weights, masks and meters come after.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["l2"]


def l2(answer_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,) float32."""
    return (answer_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(1)
