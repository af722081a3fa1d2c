from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from simpletuner.networks.shell import Float32Shell


class Network(nn.Module):
    """Half-precision weights, and an ear."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).bfloat16()
        self.config = SimpleNamespace(in_channels=2)

    def forward(self, *, sample, ratio, return_dict):
        self.heard = {"sample": sample, "ratio": ratio, "return_dict": return_dict}
        return (self.layer(sample), "more")


def test_a_pipeline_takes_it_for_float32_and_the_network_hears_its_own_format():
    network = Network()
    shell = Float32Shell(network, torch.bfloat16, exact=("ratio",))
    assert next(shell.parameters()).dtype == shell.dtype == torch.float32
    assert shell.device == torch.device("cpu")
    assert shell.config is network.config
    answer = shell(sample=torch.ones(1, 2), ratio=torch.tensor([0.123456]), return_dict=False)
    assert len(answer) == 1
    assert answer[0].dtype == torch.float32
    assert network.heard["sample"].dtype == torch.bfloat16
    assert network.heard["ratio"].item() == torch.tensor(0.123456).item()
    assert network.heard["return_dict"] is False
