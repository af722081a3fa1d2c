"""Named tensors taken over, or refused with a message that says which do not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simpletuner.errors import UserError

__all__ = ["MEND_MODEL", "check_names", "copy", "on_cpu", "shapes"]

MEND_MODEL = "train the model that it was made from, with the same model_type, or start afresh in another output_dir."


def check_names(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError unless both hold the same names."""
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if not missing and not unknown:
        return
    parts = [
        f"{len(names)} of its weights {what}, first {names[0]}"
        for names, what in ((unknown, "have no place here"), (missing, "are not in it"))
        if names
    ]
    raise UserError(f"{source} does not fit this run.", f"{'; '.join(parts)}.", MEND_MODEL)


def shapes(name: str, theirs: Tensor, ours: Tensor) -> str:
    """How two shapes differ, for a message."""
    return f"{name} is {tuple(theirs.shape)} there and {tuple(ours.shape)} here."


@torch.no_grad()
def copy(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Overwrite the tensors of `own`."""
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy of its own, that no later step changes."""
    return tensor.detach().to("cpu", copy=True).contiguous()
