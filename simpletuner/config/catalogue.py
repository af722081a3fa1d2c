"""Data only: optimisers, formats of frozen weights, packages of attention kernels, and what must be known of each."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from simpletuner.config.settings import (
    FACTOR,
    INNER_RATES,
    NUMBER,
    POSITIVE,
    RATES,
    SHARE,
    SWITCH,
    THREE_RATES,
    TWO_NUMBERS,
    WHOLE,
    Setting,
    optional,
)

__all__ = ["ATTENTION", "OPTIMIZERS", "PRECISIONS", "AttentionRow", "OptimizerRow", "PrecisionRow"]


@dataclass(frozen=True)
class OptimizerRow:
    """One update rule."""

    target: str
    """"module:attribute" of its class."""
    trained_dtype: str = "float32"
    """Format of the trained weights under `mixed_precision=bf16`; float32 without it."""
    state_bytes: tuple[float, float] = (8, 8)
    """What it keeps of each trained bfloat16 weight, and of each float32 one, in large layers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments, beneath the user's `optimizer_config`."""
    accepts: Mapping[str, Setting] = field(default_factory=dict)
    """Keys that `optimizer_config` may name. None that changes the layout of the state: a resumed run could not obey it."""
    extra: str = ""
    """Extra that brings the package, if it is not in the core."""
    rate: float | None = None
    """Default `learning_rate`, whatever is trained."""
    rate_factor: float = 1.0
    """Else the default is this much of Adam's."""
    carried: tuple[str, ...] = ()
    """Entries of the parameter group that are state: counters and estimates."""
    remade: tuple[str, ...] = ()
    """Entries of a parameter's state that follow from the settings, so that they are not saved."""
    unpaged: str = ""
    """The row that gives the same numbers with its state in ordinary memory, where there is no CUDA to page it."""
    devices: tuple[str, ...] = ("cuda", "mps", "cpu")
    """Where it works."""
    capability: tuple[int, int] = (0, 0)
    """Least compute capability of an NVIDIA card."""
    instead: str = "adamw_bf16"
    """The row to take where this one does not work."""
    is_compiled: bool = False
    """Whether its step goes through `torch.compile`, which needs a C++ compiler."""
    averages: bool = False
    """Whether it averages its weights, in place of a falling rate."""


DECAY = {"weight_decay": NUMBER}
ADAM = {"betas": RATES, "eps": NUMBER, **DECAY}
ADAM_SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def _optimi(
    attribute: str,
    accepts: Mapping[str, Setting],
    settings: Mapping[str, Any],
    *,
    moments: int = 2,
    trained_dtype: str = "bfloat16",
    **facts: Any,
) -> OptimizerRow:
    """bfloat16 weights by Kahan summation, which keeps what rounding took in a buffer of the same size."""
    return OptimizerRow(
        f"optimi:{attribute}",
        trained_dtype=trained_dtype,
        state_bytes=(2 * moments + 2, 4 * moments),
        settings=settings,
        accepts={**accepts, "decouple_lr": SWITCH},
        extra="optimi",
        carried=("step",),
        **facts,
    )


def _bnb(
    name: str, attribute: str, accepts: Mapping[str, Setting], settings: Mapping[str, Any], *, moments: int = 2, **facts: Any
) -> dict[str, Any]:
    """The row with 32-bit state, the one with 8-bit state, and both paged, if there is a class for it."""
    rows = {}
    for bits in ("", "8bit"):
        row = {"settings": settings, "accepts": accepts, "extra": "bnb", "devices": ("cuda", "cpu")} | facts
        row["state_bytes"] = (moments * (1.02 if bits else 4),) * 2
        unpaged = f"bnb-{name}{bits}"
        rows[unpaged] = OptimizerRow(f"bitsandbytes.optim:{attribute}{bits}", remade=("qmap1", "qmap2"), **row)
        if name != "adagrad":
            target = f"bitsandbytes.optim:Paged{attribute}{bits}"
            rows[f"{unpaged}-paged"] = OptimizerRow(target, remade=("qmap1", "qmap2"), unpaged=unpaged, **row)
    return rows


def _ao(attribute: str, state_bytes: float, **facts: Any) -> OptimizerRow:
    """Moments in 8 or 4 bits, where a weight has at least 4096 numbers. Weights stay float32: the rounding that torchao has for
    bfloat16 ones draws from the global generator, which differs between ranks."""
    return OptimizerRow(
        f"torchao.optim:{attribute}",
        state_bytes=(state_bytes, state_bytes),
        settings=ADAM_SETTINGS,
        accepts=ADAM,
        extra="torchao",
        remade=("qmap",),
        devices=("cuda", "cpu"),
        is_compiled=True,
        **facts,
    )


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw_bf16": OptimizerRow(
        "simpletuner.training.adamw_bf16:AdamWBF16",
        trained_dtype="bfloat16",
        state_bytes=(4, 8),
        settings=ADAM_SETTINGS,
        accepts=ADAM,
    ),
    "torch-adamw": OptimizerRow("torch.optim:AdamW", settings={**ADAM_SETTINGS, "fused": True}, accepts=ADAM),
    "torch-adam": OptimizerRow(
        "torch.optim:Adam", settings={**ADAM_SETTINGS, "weight_decay": 0.0, "fused": True}, accepts=ADAM
    ),
    "torch-sgd": OptimizerRow(
        "torch.optim:SGD",
        state_bytes=(2, 4),
        # Not fused: where fp16 skips the very first step, its momentum stays memory that nobody has written (torch 2.13).
        settings={"momentum": 0.9, "weight_decay": 0.0},
        accepts={"momentum": SHARE, **DECAY},
    ),
    "torch-radam": OptimizerRow(
        "torch.optim:RAdam",
        settings={**ADAM_SETTINGS, "weight_decay": 0.0},
        accepts={**ADAM, "decoupled_weight_decay": SWITCH},
    ),
    "torch-adafactor": OptimizerRow(
        "torch.optim:Adafactor",
        state_bytes=(0, 0),  # of a row and of a column a number each
        settings={"eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.0},
        accepts={"eps": TWO_NUMBERS, "d": FACTOR, **DECAY},
    ),
    "optimi-adamw": _optimi("AdamW", ADAM, {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}),
    "optimi-adam": _optimi("Adam", ADAM, {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}),
    "optimi-stableadamw": _optimi(
        "StableAdamW",
        ADAM,
        {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01},
        remade=("eps_sq", "mean_square"),
    ),
    "optimi-lion": _optimi(
        "Lion", {"betas": RATES, **DECAY}, {"betas": (0.9, 0.99), "weight_decay": 0.0}, moments=1, rate_factor=0.2
    ),
    "optimi-radam": _optimi("RAdam", {**ADAM, "decouple_wd": SWITCH}, {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}),
    "optimi-ranger": _optimi(
        "Ranger",
        {**ADAM, "k": WHOLE, "alpha": SHARE},
        {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "k": 6, "alpha": 0.5},
        moments=3,
        trained_dtype="float32",  # its lookahead loses what Kahan summation kept: small steps move nothing (torch-optimi 0.3.3)
    ),
    "optimi-adan": _optimi(
        "Adan",
        {**ADAM, "betas": THREE_RATES},
        # `None` is Kahan summation where the weights are bfloat16; the class leaves it out.
        {"betas": (0.98, 0.92, 0.99), "eps": 1e-6, "weight_decay": 0.02, "kahan_sum": None},
        moments=4,
    ),
    "optimi-sgd": _optimi(
        "SGD", {"momentum": SHARE, **DECAY, "decouple_wd": SWITCH}, {"momentum": 0.9, "weight_decay": 0.0}, moments=1
    ),
    **_bnb("adamw", "AdamW", ADAM, ADAM_SETTINGS),
    **_bnb("adam", "Adam", ADAM, {**ADAM_SETTINGS, "weight_decay": 0.0}),
    **_bnb("adagrad", "Adagrad", {"eps": NUMBER, **DECAY}, {"eps": 1e-10, "weight_decay": 0.0}, moments=1),
    **_bnb("lion", "Lion", {"betas": RATES, **DECAY}, {"betas": (0.9, 0.99), "weight_decay": 0.0}, moments=1, rate_factor=0.2),
    **_bnb(
        "ademamix",
        "AdEMAMix",
        {**ADAM, "betas": THREE_RATES, "alpha": NUMBER, "t_alpha": optional(WHOLE), "t_beta3": optional(WHOLE)},
        {"betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "weight_decay": 0.01, "alpha": 5.0},
        moments=3,
    ),
    "ao-adamw8bit": _ao("AdamW8bit", 2.04),
    "ao-adamw4bit": _ao("AdamW4bit", 1.07),
    "ao-adamwfp8": _ao("AdamWFp8", 2.04, capability=(8, 9), instead="ao-adamw8bit"),
    "prodigy": OptimizerRow(
        "prodigyopt:Prodigy",
        state_bytes=(8, 16),
        # The safeguard is what its authors advise where the rate warms up, as it does by default.
        settings={**ADAM_SETTINGS, "d_coef": 1.0, "use_bias_correction": False, "safeguard_warmup": True},
        accepts={
            **ADAM,
            "eps": POSITIVE,
            "beta3": optional(SHARE),
            "d0": POSITIVE,
            "d_coef": POSITIVE,
            "growth_rate": FACTOR,
            "use_bias_correction": SWITCH,
            "safeguard_warmup": SWITCH,
            "decouple": SWITCH,
        },
        extra="prodigy",
        rate=1.0,
        carried=("d", "d_max", "d_numerator", "k"),
    ),
    "adamw_schedulefree": OptimizerRow(
        "schedulefree:AdamWScheduleFree",
        settings=ADAM_SETTINGS,
        accepts={**ADAM, "betas": INNER_RATES, "r": NUMBER, "weight_lr_power": NUMBER},
        extra="schedulefree",
        carried=("k", "weight_sum", "lr_max"),
        averages=True,
    ),
    "came": OptimizerRow(
        "came_pytorch:CAME",
        state_bytes=(4, 4),
        settings={"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), "weight_decay": 0.01, "clip_threshold": 1.0},
        accepts={"betas": THREE_RATES, "eps": TWO_NUMBERS, **DECAY, "clip_threshold": POSITIVE},
        extra="came",
    ),
}


@dataclass(frozen=True)
class PrecisionRow:
    """One format of frozen weights. How it is written is in `networks/codecs.py`, under the same name."""

    module: str
    """The library that chooses scales and codes."""
    extra: str
    """Extra that brings it."""
    bits: float
    """Bits per weight with the scales, in large layers of a bfloat16 base."""
    not_on: Mapping[str, str] = field(default_factory=dict)
    """Device where it does not work -> why."""
    instead: tuple[str, ...] = ()
    """What works there."""


NO_FP8 = {"mps": "Apple's GPUs have no 8-bit floating point."}
NO_BNB = {"mps": "bitsandbytes has no kernel for it there that we could rely on."}

PRECISIONS: dict[str, PrecisionRow] = {
    "int8-quanto": PrecisionRow("optimum.quanto", "quanto", 8.01),
    "int4-quanto": PrecisionRow("optimum.quanto", "quanto", 4.25),
    "int2-quanto": PrecisionRow("optimum.quanto", "quanto", 2.25),
    "fp8-quanto": PrecisionRow("optimum.quanto", "quanto", 8.01, NO_FP8, ("int8-quanto", "int4-quanto")),
    "int8-torchao": PrecisionRow("torchao", "torchao", 8.02),
    "fp8-torchao": PrecisionRow("torchao", "torchao", 8.02, NO_FP8, ("int8-quanto", "int4-quanto")),
    "nf4-bnb": PrecisionRow("bitsandbytes", "bnb", 4.13, NO_BNB, ("int4-quanto",)),
}


@dataclass(frozen=True)
class AttentionRow:
    """Attention kernels of a package, for CUDA in half precision. They know no masks, and paint the gallery only."""

    backend: str
    """Its name in diffusers' attention dispatcher."""
    module: str
    """The package, whose distribution has the same name."""
    not_trained: str
    """Why nothing is trained by it."""
    pip: str
    """What brings it. None can be an extra: each is compiled for the card as it is installed."""
    head_widths: Container[int]
    widths: str
    """The same in words."""
    version: tuple[int, ...] = ()
    """Least version that the dispatcher takes."""
    capability: tuple[int, int] = (8, 0)
    """Least compute capability."""
    below: tuple[int, int] | None = None
    """Compute capability from which on it does not work."""
    on_amd: bool = False


QUANTISED = "it rounds queries and keys to 8 bits and has no backward pass."
FORWARD_ONLY = "through diffusers it has no backward pass."


def _sage(backend: str, capability: tuple[int, int] = (8, 0)) -> AttentionRow:
    """What PyPI has of it is version 1, which diffusers does not take."""
    pip = "pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention"
    widths = (64, 96, 128)
    return AttentionRow(backend, "sageattention", QUANTISED, pip, widths, "64, 96 or 128", (2, 1, 1), capability)


ATTENTION: dict[str, AttentionRow] = {
    "sageattention": _sage("sage"),
    "sageattention-int8-fp16-triton": _sage("_sage_qk_int8_pv_fp16_triton"),
    "sageattention-int8-fp16-cuda": _sage("_sage_qk_int8_pv_fp16_cuda"),
    "sageattention-int8-fp8-cuda": _sage("_sage_qk_int8_pv_fp8_cuda", (8, 9)),
    "flash-attn": AttentionRow(
        "flash",
        "flash_attn",
        "those have FlashAttention 2 as well.",
        "pip install --no-build-isolation flash-attn",
        range(8, 257, 8),
        "multiples of 8 up to 256",
        (2, 6, 3),
        on_amd=True,
    ),
    "flash-attn-3": AttentionRow(
        "_flash_3",
        "flash_attn_3",
        FORWARD_ONLY,
        "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
        range(8, 257, 8),
        "multiples of 8 up to 256",
        capability=(9, 0),
        below=(10, 0),
    ),
}
"""`attention_mechanism` -> its kernels. Source of capabilities and widths: the README of each package."""
