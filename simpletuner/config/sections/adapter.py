"""The adapter that is trained beside a frozen base."""

from __future__ import annotations

from typing import Any, Literal

from simpletuner.config.options import Section, option

__all__ = ["Adapter"]

STANDARD = "model_type=lora and lora_type=standard"
LYCORIS = "model_type=lora and lora_type=lycoris"


class Adapter(Section):
    """What is trained beside the frozen base (`model_type=lora`)."""

    lora_type: Literal["standard", "lycoris"] = option("standard", when="model_type=lora")
    """Kind of adapter. `standard` is LoRA, as every tool loads it; `lycoris` is LoKr, LoHa, LoCon or whole weights by the
    LyCORIS library, as `lycoris_config` says."""

    lora_rank: int = option(16, ge=1, level="essential", when=STANDARD)
    """Width of the low-rank matrices. 4-32 for a style or a subject, 64-128 for many concepts."""

    lora_alpha: float | None = option(None, gt=0, when=STANDARD)
    """Strength of the adapter: its output is scaled by alpha / rank. Unset: equal to `lora_rank`."""

    lora_dropout: float = option(0.1, ge=0, lt=1, when=STANDARD)
    """Share of the adapter's inputs dropped in training."""

    lora_init_type: Literal["default", "gaussian"] = option("default", when=STANDARD)
    """How the down projection starts (`default`: Kaiming-uniform). The up projection starts at zero either way."""

    lora_target_preset: str = option("attention", when=f"{STANDARD} and peft_lora_target_modules=None")
    """Which layers get an adapter, by one of the family's names: `attention`, `self-attention`, `cross-attention`,
    `feed-forward`, `full` (every linear layer and 1x1 convolution), where the family has such."""

    peft_lora_target_modules: tuple[str, ...] | None = option(None, when=STANDARD)
    """Which layers get an adapter, by the ends of their names ("to_q", "attn2.to_k"). Wins over `lora_target_preset`."""

    use_dora: bool = option(False, when=STANDARD)
    """DoRA: the length of each weight's rows is trained apart from their direction. Nearer to full tuning at small ranks,
    slower."""

    lycoris_config: dict[str, Any] | str | None = option(None, path="input", when=LYCORIS)
    """A JSON file as the LyCORIS library and SimpleTuner have it (`algo`, `multiplier`, `linear_dim`, `linear_alpha`, `factor`,
    `apply_preset` ...), or the object itself. Unset: LoKr of factor 16 in attention and feed-forward layers."""

    init_lora: str | None = option(None, path="input", when="model_type=lora")
    """A `pytorch_lora_weights.safetensors` file (or its folder) to start from; kind, sizes and targets must be the same."""
