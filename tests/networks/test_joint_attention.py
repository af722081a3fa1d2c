"""Attention by kernels of packages: the stock processor's numbers through the dispatcher, for the block only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName

from simpletuner.config.catalogue import ATTENTION
from simpletuner.networks.joint_attention import JointAttention, attending

Repository = Callable[[str], Path]


def transformer(repository: Path, dtype: torch.dtype = torch.float32) -> Any:
    return SD3Transformer2DModel.from_pretrained(repository / "transformer", torch_dtype=dtype).eval()


def answer(denoiser: Any) -> torch.Tensor:
    torch.manual_seed(0)
    config, dtype = denoiser.config, denoiser.dtype
    text = torch.randn(2, 9, config.joint_attention_dim, dtype=dtype)
    pooled = torch.randn(2, config.pooled_projection_dim, dtype=dtype)
    with torch.no_grad():
        return denoiser(torch.randn(2, 16, 6, 8, dtype=dtype), text, pooled, torch.tensor([300.0, 800.0])).sample


@pytest.mark.parametrize("name", [row.backend for row in ATTENTION.values()])
def test_every_kernel_has_its_name_in_the_installed_diffusers(name: str) -> None:
    assert AttentionBackendName(name)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium", "sd3.5-large"])
def test_through_the_native_backend_it_is_the_stock_processor_bit_for_bit(
    tiny_repo: Repository, variant: str, autocast: bool
) -> None:
    denoiser = transformer(tiny_repo(variant))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock = answer(denoiser)
        denoiser.set_attn_processor(JointAttention("native"))
        ours = answer(denoiser)
    assert torch.equal(ours, stock)


def test_in_half_precision_too(tiny_repo: Repository) -> None:
    denoiser = transformer(tiny_repo("sd3.5-medium"), torch.bfloat16)
    stock = answer(denoiser)
    denoiser.set_attn_processor(JointAttention("native"))
    assert torch.equal(answer(denoiser), stock)


def test_gradients_are_the_stock_processors_as_well(tiny_repo: Repository) -> None:
    gradients = []
    for processors in (lambda _: None, lambda one: one.set_attn_processor(JointAttention("native"))):
        denoiser = transformer(tiny_repo("sd3.5-medium"))
        processors(denoiser)
        with torch.enable_grad():
            x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
            text, pooled = (torch.ones(shape) for shape in ((1, 5, 64), (1, denoiser.config.pooled_projection_dim)))
            denoiser(x, text, pooled, torch.tensor([300.0])).sample.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("mechanism", ATTENTION)
def test_each_attention_of_the_denoiser_calls_its_kernels_and_only_in_the_block(
    tiny_repo: Repository, dispatched: Callable[[str], list[torch.Tensor]], mechanism: str
) -> None:
    denoiser = transformer(tiny_repo("sd3.5-medium"))
    own = dict(denoiser.attn_processors)
    calls = dispatched(mechanism)
    with attending(denoiser, mechanism):
        inside = answer(denoiser)
    assert len(calls) == len(own) == denoiser.config.num_layers + len(denoiser.config.dual_attention_layers)
    assert denoiser.attn_processors == own
    assert torch.equal(answer(denoiser), inside)
    assert len(calls) == len(own)


def test_an_interrupted_gallery_leaves_the_denoiser_as_it_was(tiny_repo: Repository) -> None:
    denoiser = transformer(tiny_repo("sd3"))
    own = dict(denoiser.attn_processors)
    with pytest.raises(KeyboardInterrupt), attending(denoiser, "sageattention"):
        raise KeyboardInterrupt
    assert denoiser.attn_processors == own


@pytest.mark.parametrize("mechanism", ["diffusers", "native-flash", "cudnn"])
def test_pytorchs_own_kernels_need_no_other_processor(tiny_repo: Repository, mechanism: str) -> None:
    denoiser = transformer(tiny_repo("sd3"))
    own = dict(denoiser.attn_processors)
    with attending(denoiser, mechanism):
        assert denoiser.attn_processors == own


def test_compiled_blocks_call_the_kernels_in_the_block_and_their_own_after_it(
    tiny_repo: Repository, dispatched: Callable[[str], list[torch.Tensor]]
) -> None:
    denoiser = transformer(tiny_repo("sd3"))
    stock, calls = answer(denoiser), dispatched("sageattention")
    for block in denoiser.transformer_blocks:
        block.compile(backend="eager")
    found = [answer(denoiser)]
    with attending(denoiser, "sageattention"):
        found.append(answer(denoiser))
    count = len(calls)
    found.append(answer(denoiser))
    assert count == len(calls) == denoiser.config.num_layers
    assert all(torch.equal(one, stock) for one in found)
