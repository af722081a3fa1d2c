"""Attention whose cost grows with the number of tokens, not with its square.

Shape letters:  B batch,  N tokens,  H heads,  D width of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["LinearAttention", "linear_attention"]


def linear_attention(query_BHND: Tensor, key_BHND: Tensor, value_BHND: Tensor) -> Tensor:
    """Attention with relu(q) . relu(k) as its weights, in float32 whatever the surroundings.

    Its sums run over all tokens and overflow float16. Upcasting alone does not hold under autocast, whose matmuls would
    return to half precision, so autocast is off in here.
    Source: Katharopoulos et al. 2020 (Transformers are RNNs), equation 5; relu as in Xie et al. 2024 (Sana), section 2.2.
    """
    # Meta tensors, which estimates count, know no autocast: torch raises at the very question (2.13).
    with nullcontext() if query_BHND.is_meta else torch.autocast(query_BHND.device.type, enabled=False):
        query_BHND, key_BHND, value_BHND = query_BHND.float().relu(), key_BHND.float().relu(), value_BHND.float()
        memory_BHDD = key_BHND.transpose(-1, -2) @ value_BHND
        total_BHD1 = key_BHND.sum(dim=-2).unsqueeze(-1)
        return (query_BHND @ memory_BHDD) / (query_BHND @ total_BHD1 + 1e-15)


class LinearAttention:
    """Processor for a diffusers `Attention` module: self-attention by `linear_attention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None, "it mixes the picture's own tokens"
        assert attention_mask is None, "a picture has no padding"
        query_BNC, key_BNC, value_BNC = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query_BNC = attn.norm_q(query_BNC)
        if attn.norm_k is not None:
            key_BNC = attn.norm_k(key_BNC)
        heads = [tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in (query_BNC, key_BNC, value_BNC)]
        mixed_BNC = linear_attention(*heads).transpose(1, 2).flatten(2)
        linear, dropout = attn.to_out
        return dropout(linear(mixed_BNC.to(hidden_states.dtype)))
