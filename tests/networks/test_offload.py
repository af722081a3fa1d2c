"""Offloaded blocks compute what others do. There is no second device here: what is away is full of NaN in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.networks.checkpointing import checkpoint_blocks
from simpletuner.networks.offload import move_others, offload_blocks
from simpletuner.networks.quantise import quantise

BLOCKS = 5
GROUPS = (1, 2, 5)


class Elsewhere:
    """Stands in for the CPU's memory: a group that is away has NaN for weights, whoever still refers to them.

    Groups move by giving a parameter other data, as between devices, so what autograd saved before is hit alike.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kept: dict[int, Tensor] = {}
        self.visits: list[ModuleGroup] = []
        self.present: list[ModuleGroup] = []
        self.most_present = 0
        patch.setattr(ModuleGroup, "onload_", lambda group: self.bring(group))
        patch.setattr(ModuleGroup, "offload_", lambda group: self.take(group))

    def bring(self, group: ModuleGroup) -> None:
        for weight in (*group.parameters, *group.buffers):
            weight.data = self.kept[id(weight)].clone()
        self.visits.append(group)
        self.present.append(group)
        self.most_present = max(self.most_present, len(self.present))

    def take(self, group: ModuleGroup) -> None:
        self.present.remove(group)
        self.spoil([*group.parameters, *group.buffers])

    def spoil(self, weights: list[Tensor]) -> None:
        for weight in weights:
            self.kept.setdefault(id(weight), weight.data)
            weight.data = torch.full_like(weight.data, torch.nan if weight.is_floating_point() else 77)


def sana(adapter: str, *, is_checkpointed: bool = True, precision: str = "no_change") -> Any:
    torch.manual_seed(0)
    model: Any = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=BLOCKS, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=4,
    ).eval()  # fmt: skip
    model.requires_grad_(False)
    quantise(model, precision)
    if adapter == "lokr":
        model.adapter = [lokr(model)]  # in a list: beside the network, as it is in training
    else:
        config = LoraConfig(
            r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"], use_dora=adapter == "dora"
        )
        inject_adapter_in_model(config, model)
    if is_checkpointed:
        checkpoint_blocks(model, list(model.transformer_blocks), 1)
    return model


def lokr(model: nn.Module) -> Any:
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["Attention"]})
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=2, algo="lokr")
    network.apply_to()
    for weight in network.parameters():
        weight.data = torch.full_like(weight, 0.1)
    return network


def trained(model: Any) -> list[nn.Parameter]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return weights or list(model.adapter[0].parameters())


def passes(model: Any) -> list[Tensor]:
    """Answer and gradients of one step."""
    draw = torch.Generator().manual_seed(1)
    x_BCHW, text_BLD = torch.randn(2, 4, 4, 4, generator=draw), torch.randn(2, 6, 8, generator=draw)
    answer = model(x_BCHW, encoder_hidden_states=text_BLD, timestep=torch.tensor([5.0, 9.0]), return_dict=False)[0]
    answer.square().mean().backward()
    gradients = [weight.grad for weight in trained(model)]
    assert all(gradient is not None for gradient in gradients)
    found = [answer.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]
    for weight in trained(model):
        weight.grad = None
    return found


def offloaded(model: Any, elsewhere: Elsewhere, blocks_per_group: int) -> list[Tensor]:
    weights = offload_blocks(list(model.transformer_blocks), "cpu", blocks_per_group=blocks_per_group, is_pinned=False)
    elsewhere.spoil(weights)
    return weights


@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("blocks_per_group", GROUPS)
def test_answers_and_gradients_are_the_same_bits(monkeypatch: pytest.MonkeyPatch, adapter: str, blocks_per_group: int) -> None:
    expected = passes(sana(adapter))
    elsewhere, model = Elsewhere(monkeypatch), sana(adapter)
    offloaded(model, elsewhere, blocks_per_group)
    for _ in range(2):  # the second step begins where the first left its last group
        assert all(torch.equal(one, other) for one, other in zip(expected, passes(model), strict=True))
    assert elsewhere.most_present == 1


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto", "fp8-torchao", "nf4-bnb"])
def test_so_they_are_over_a_base_in_few_bits(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    expected = passes(sana("lora", precision=precision))
    elsewhere, model = Elsewhere(monkeypatch), sana("lora", precision=precision)
    away = offloaded(model, elsewhere, 2)
    assert any(not weight.is_floating_point() for weight in away), "the codes go away, too"
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(expected, passes(model), strict=True))


def test_without_checkpointing_the_backward_pass_would_find_weights_that_are_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has teeth, and the rule that asks for checkpointing a reason."""
    elsewhere, model = Elsewhere(monkeypatch), sana("lora", is_checkpointed=False)
    offloaded(model, elsewhere, 1)
    answer, *gradients = passes(model)
    assert answer.isfinite().all()
    assert any(gradient.isnan().any() for gradient in gradients)


def test_blocks_visit_in_order_and_are_recomputed_backwards_the_last_without_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, model = Elsewhere(monkeypatch), sana("lora")
    offloaded(model, elsewhere, 1)
    passes(model)
    places = {block: place for place, block in enumerate(model.transformer_blocks)}
    visits = [places[group.onload_leader] for group in elsewhere.visits if group.onload_leader is not None]
    assert visits == [0, 1, 2, 3, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("blocks_per_group", GROUPS)
def test_frozen_weights_of_blocks_go_away_and_nothing_else(monkeypatch: pytest.MonkeyPatch, blocks_per_group: int) -> None:
    model = sana("lora")
    weights = {id(weight) for weight in offloaded(model, Elsewhere(monkeypatch), blocks_per_group)}
    names = {name for name, weight in model.named_parameters() if id(weight) in weights}
    frozen = {
        name for name, weight in model.named_parameters() if name.startswith("transformer_blocks") and not weight.requires_grad
    }
    assert names == frozen


def test_all_but_the_offloaded_weights_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.hooks.group_offloading.TorchDeviceBackend", lambda device: None)  # knows no `meta`
    model = sana("lora")
    weights = offload_blocks(list(model.transformer_blocks), "meta", blocks_per_group=1, is_pinned=False)
    away = {id(weight) for weight in weights}
    names = {name for name, weight in model.named_parameters() if id(weight) in away}
    move_others(model, weights, "meta")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == ("cpu" if name in names else "meta"), name
