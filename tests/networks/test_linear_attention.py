"""Our processor against the stock one, with and without autocast."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

from simpletuner.networks.linear_attention import LinearAttention, linear_attention


def attention(processor, qk_norm: str | None = None) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=32, heads=4, kv_heads=4 if qk_norm else None, dim_head=8, qk_norm=qk_norm, processor=processor)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_in_float32_it_equals_the_stock_processor(tokens, qk_norm):
    stock, ours = attention(SanaLinearAttnProcessor2_0(), qk_norm), attention(LinearAttention(), qk_norm)
    torch.testing.assert_close(ours(tokens), stock(tokens))


def test_bf16_weights_give_bf16_answers_near_the_stock_ones(tokens):
    stock, ours = attention(SanaLinearAttnProcessor2_0()).bfloat16(), attention(LinearAttention()).bfloat16()
    answer = ours(tokens.bfloat16())
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer, stock(tokens.bfloat16()), atol=2e-3, rtol=2e-2)


def core_under_autocast(processor, tokens) -> torch.Tensor:
    """What enters the output projection when autocast surrounds the module."""
    module = attention(processor)
    seen = []
    module.to_out[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        module(tokens)
    return seen[0]


def test_under_autocast_its_core_stays_in_float32_where_the_stock_one_does_not(tokens):
    module = attention(LinearAttention())
    with torch.autocast("cpu", torch.bfloat16):
        heads = [project(tokens).unflatten(-1, (4, 8)).transpose(1, 2) for project in (module.to_q, module.to_k, module.to_v)]
    exact = reference(*(head.double() for head in heads)).transpose(1, 2).flatten(2)
    ours = (core_under_autocast(LinearAttention(), tokens).double() - exact).abs().max()
    stock = (core_under_autocast(SanaLinearAttnProcessor2_0(), tokens).double() - exact).abs().max()
    assert ours < 1e-5
    assert stock > 1e-3


def test_sums_beyond_half_precision_do_not_overflow():
    query, key, value = (torch.full((1, 1, 4096, 8), 8.0, dtype=torch.float16) for _ in range(3))
    assert torch.all(linear_attention(query, key, value) == 8.0)


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The square form: all weights written out."""
    weights = query.relu() @ key.relu().transpose(-1, -2)
    return weights @ value / (weights.sum(-1, keepdim=True) + 1e-15)  # a query may be zero all through
