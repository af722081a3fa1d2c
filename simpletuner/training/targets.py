"""Which layers of a denoiser get a LoRA: names as PEFT matches them, each held to a layer that is there."""

from __future__ import annotations

from torch import nn

from simpletuner.config.sections import Adapter
from simpletuner.config.spelling import nearest
from simpletuner.errors import UserError
from simpletuner.families.base import ModelFamily

__all__ = ["lora_targets"]


def lora_targets(adapter: Adapter, family: ModelFamily, denoiser: nn.Module) -> list[str]:
    """Sorted ends of names. Raises UserError if one of the user's matches no layer that can have an adapter."""
    wanted = adapter.peft_lora_target_modules
    if wanted is None:
        return sorted(family.adapter_presets[adapter.lora_target_preset])
    layers = [name for name, module in denoiser.named_modules() if _can_have_one(module)]
    ends = sorted({_end(name) for name in layers})
    missing = [name for name in wanted if not any(layer == name or layer.endswith(f".{name}") for layer in layers)]
    if missing:
        near = [f'"{found}" for "{name}"' for name in missing if (found := nearest(name, [*ends, *layers]))]
        raise UserError(
            f"`peft_lora_target_modules` names {', '.join(missing)}, which no layer of {type(denoiser).__name__} ends in.",
            why=f"its linear layers and plain convolutions end in: {', '.join(ends)}.",
            mend=f"did you mean {', '.join(near)}?" if near else "take some of these.",
        )
    return sorted(set(wanted))


def _can_have_one(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1  # PEFT's matrices of a grouped one need a rank that the groups divide
    return isinstance(module, nn.Linear)


def _end(name: str) -> str:
    """The last part of a name, with the one before where it is a number ("to_out.0")."""
    *rest, last = name.split(".")
    return f"{rest[-1]}.{last}" if last.isdigit() and rest else last
