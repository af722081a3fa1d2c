"""Which blocks are recomputed, and that gradients do not change by it."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from simpletuner.networks.checkpointing import checkpoint_blocks


def five_blocks() -> SanaTransformer2DModel:
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=5, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=4, dropout=0.0,
    )  # fmt: skip
    return model.eval()


def backward(model: SanaTransformer2DModel) -> list[int]:
    """One forward and backward pass in which only the third block's first weights train; how often each block ran."""
    model.requires_grad_(False)
    model.transformer_blocks[2].attn1.to_q.weight.requires_grad_(True)
    runs = [0] * len(model.transformer_blocks)

    def count(place: int):
        def hook(*_):
            runs[place] += 1

        return hook

    hooks = [block.attn1.register_forward_pre_hook(count(place)) for place, block in enumerate(model.transformer_blocks)]
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 4, 4, generator=draw), torch.randn(1, 6, 8, generator=draw)
    answer = model(x, encoder_hidden_states=text, timestep=torch.tensor([500.0]), return_dict=False)[0]
    answer.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return runs


@pytest.mark.parametrize(
    ("interval", "runs"), [(1, [1, 1, 2, 2, 2]), (2, [1, 1, 2, 1, 2]), (3, [1, 1, 1, 2, 1]), (9, [1, 1, 1, 1, 1])]
)
def test_every_nth_block_is_recomputed_with_a_frozen_base_in_eval_mode_too(interval, runs):
    # Blocks before the first trained weight need no gradient, so torch never recomputes them.
    model = five_blocks()
    checkpoint_blocks(model, list(model.transformer_blocks), interval)
    assert backward(model) == runs


@pytest.mark.parametrize("interval", [1, 2])
def test_gradients_are_the_same_as_without(interval):
    plain, checkpointed = five_blocks(), five_blocks()
    checkpoint_blocks(checkpointed, list(checkpointed.transformer_blocks), interval)
    backward(plain)
    backward(checkpointed)
    assert torch.equal(
        plain.transformer_blocks[2].attn1.to_q.weight.grad, checkpointed.transformer_blocks[2].attn1.to_q.weight.grad
    )


def test_dropout_falls_alike_in_both_passes():
    grads = []
    for interval in (None, 1):
        model = five_blocks()
        for block in model.transformer_blocks:
            block.attn1.to_out[1] = torch.nn.Dropout(0.5)
        model.train()
        if interval:
            checkpoint_blocks(model, list(model.transformer_blocks), interval)
        torch.manual_seed(7)
        backward(model)
        grads.append(model.transformer_blocks[2].attn1.to_q.weight.grad)
    assert torch.equal(*grads)
