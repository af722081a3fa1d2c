"""Compiled blocks compute what plain ones do, in few graphs, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch._dynamo.utils import counters

from simpletuner.networks.checkpointing import checkpoint_blocks
from simpletuner.networks.compiling import compile_blocks
from simpletuner.networks.linear_attention import LinearAttention

ROWS = (4, 6, 4, 8, 6)
"""Latent rows of pictures, as buckets mix them."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def sana(model_type: str, *, is_checkpointed: bool) -> Any:
    """Three blocks of a Sana as training has them."""
    torch.manual_seed(0)
    model: Any = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=4, dropout=0.0,
    ).eval()  # fmt: skip
    for block in model.transformer_blocks:
        block.attn1.set_processor(LinearAttention())
    if model_type == "lora":
        model.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.2, target_modules=targets), model)
        for name, module in model.named_modules():
            module.train("lora_dropout" in name)
    if is_checkpointed:
        checkpoint_blocks(model, list(model.transformer_blocks), 1)
    return model


def passes(model: Any, rows: tuple[int, ...]) -> list[Tensor]:
    """Answers and gradients for pictures of these heights."""
    found: list[Tensor] = []
    for size in rows:
        draw = torch.Generator().manual_seed(size)
        torch.manual_seed(5)
        answer = model(
            torch.randn(2, 4, size, 4, generator=draw),
            encoder_hidden_states=torch.randn(2, 6, 8, generator=draw),
            encoder_attention_mask=torch.ones(2, 6, dtype=torch.long),
            timestep=torch.tensor([500.0, 100.0]),
            return_dict=False,
        )[0]
        answer.square().mean().backward()
        found += [answer.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
        model.zero_grad()
    return found


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_traced_blocks_give_the_same_bits_without_a_break_in_few_graphs(model_type: str, is_checkpointed: bool) -> None:
    plain, compiled = (sana(model_type, is_checkpointed=is_checkpointed) for _ in range(2))
    compile_blocks(list(compiled.transformer_blocks), "eager")
    for expected, found in zip(passes(plain, ROWS), passes(compiled, ROWS), strict=True):
        assert torch.equal(found, expected)
    assert sum(counters["graph_break"].values()) == 0
    # Two for each size: the first block's input needs no gradient, that of the others does.
    assert counters["stats"]["unique_graphs"] <= 2 * len(set(ROWS))


def test_a_compiled_backward_pass_gives_the_same_gradients() -> None:
    plain, compiled = (sana("lora", is_checkpointed=True) for _ in range(2))
    compile_blocks(list(compiled.transformer_blocks), "aot_eager")
    for expected, found in zip(passes(plain, ROWS[:2]), passes(compiled, ROWS[:2]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_adapters_can_be_switched_off_in_compiled_blocks() -> None:
    plain, compiled = (sana("lora", is_checkpointed=False) for _ in range(2))
    compile_blocks(list(compiled.transformer_blocks), "eager")
    passes(compiled, ROWS[:1])
    answers = []
    for model in (plain, compiled):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(False)
        with torch.no_grad():
            answers.append(
                model(torch.ones(1, 4, 4, 4), torch.ones(1, 6, 8), timestep=torch.tensor([3.0]), return_dict=False)[0]
            )
    assert torch.equal(*answers)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers_up_to_rounding() -> None:
    plain, compiled = (sana("full", is_checkpointed=True) for _ in range(2))
    compile_blocks(list(compiled.transformer_blocks), "inductor")
    for expected, found in zip(passes(plain, ROWS[:3]), passes(compiled, ROWS[:3]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
