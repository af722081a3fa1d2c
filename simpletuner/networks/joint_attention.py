"""Attention over picture and text together, by kernels of other packages than PyTorch.

Diffusers' own processor calls PyTorch's kernels by name, so that its `set_attention_backend` changes nothing (diffusers 0.42).
Shape letters:  B batch,  N tokens of picture and text,  H heads,  D width of a head,  C all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from simpletuner.config.catalogue import ATTENTION

__all__ = ["JointAttention", "attending"]

# Not all packages' kernels can be traced; a compiled block goes round them.
dispatch = torch.compiler.disable(dispatch_attention_fn)


@contextmanager
def attending(denoiser: nn.Module, mechanism: str) -> Iterator[None]:
    """The denoiser attends by these kernels, inside; by its own where `mechanism` is one of PyTorch's."""
    if mechanism not in ATTENTION:
        yield
        return
    processor: Any = JointAttention(ATTENTION[mechanism].backend)
    before = [(module, module.processor) for module in denoiser.modules() if isinstance(module, Attention)]
    try:
        for module, _ in before:
            module.set_processor(processor)
        yield
    finally:
        for module, own in before:
            module.set_processor(own)


class JointAttention:
    """Processor for the `Attention` modules of SD3: `backend` is a name of diffusers' attention dispatcher."""

    def __init__(self, backend: str) -> None:
        self._backend = AttentionBackendName(backend)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, C) of the picture, and of the text if there is one -> the same."""
        assert attention_mask is None, "SD3 attends to padding too"
        triple_BNHD = _heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_BNHD = _heads(attn, encoder_hidden_states, *projections, attn.norm_added_q, attn.norm_added_k)
            triple_BNHD = [torch.cat(pair, dim=1) for pair in zip(triple_BNHD, text_BNHD, strict=True)]
        query_BNHD, key_BNHD, value_BNHD = triple_BNHD
        # Under autocast normed queries and keys are float32, which PyTorch's kernels cast by themselves and others refuse.
        format_ = value_BNHD.dtype
        mixed_BNHD = dispatch(query_BNHD.to(format_), key_BNHD.to(format_), value_BNHD, backend=self._backend)
        mixed_BNC = mixed_BNHD.flatten(2).to(query_BNHD.dtype)
        linear, dropout = attn.to_out
        picture_BNC, words_BNC = mixed_BNC.tensor_split([hidden_states.shape[1]], dim=1)
        picture_BNC = dropout(linear(picture_BNC))
        if encoder_hidden_states is None:
            return picture_BNC
        return picture_BNC, words_BNC if attn.context_pre_only else attn.to_add_out(words_BNC)


def _heads(attn: Any, hidden_states: Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any) -> list[Tensor]:
    """Queries, keys and values (B, N, H, D), the first two normed where the model norms them."""
    query, key, value = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (to_q, to_k, to_v))
    return [query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value]
