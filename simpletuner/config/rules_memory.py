"""What is wrong between the options of memory, kernels and number formats, and which of them have no effect on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.hardware import missing_kernels
from simpletuner.config.run import Run
from simpletuner.errors import Problem

__all__ = ["check", "check_hardware", "notices"]

HALF = ("float16", "bfloat16")
AMPERE = (8, 0)
CUDA_ATTENTION = ("native-efficient", "cudnn")
"""Attention kernels that only CUDA has; flash and the plain one are on the CPU too."""


def check(run: Run) -> Iterator[Problem]:
    """What is wrong on any machine."""
    if run.memory.enable_group_offload:
        yield from _offload(run)
    if run.kernels.dynamo_backend != "no" and run.model.model_type == "lora" and run.adapter.use_dora:
        yield Problem(
            "dynamo_backend",
            f'`dynamo_backend` is "{run.kernels.dynamo_backend}" beside `use_dora`.',
            "PEFT's DoRA breaks each block into dozens of pieces, which takes longer than blocks that are not compiled.",
            'Set "dynamo_backend" to "no", or "use_dora" to false.',
        )


def _offload(run: Run) -> Iterator[Problem]:
    option, memory = "enable_group_offload", run.memory
    if run.model.model_type == "full":
        yield Problem(
            option,
            "`enable_group_offload` is true in full tuning.",
            "the optimiser moves every weight at every step, and needs them on the device for it.",
            'Set it to false, or "model_type" to "lora".',
        )
    elif not memory.gradient_checkpointing or memory.gradient_checkpointing_interval != 1:
        yield Problem(
            option,
            "`enable_group_offload` is true, but not every block is recomputed in the backward pass.",
            "a block that keeps its activations keeps its weights on the device with them, so nothing would be saved.",
            'Set "gradient_checkpointing" to true and "gradient_checkpointing_interval" to 1.',
        )
    if memory.group_offload_type == "leaf_level":
        yield Problem(
            "group_offload_type",
            '`group_offload_type` is "leaf_level".',
            "the backward pass needs all layers of a block at once, so single layers would take as much memory, and more time.",
            'Set it to "block_level", with "group_offload_blocks_per_group" 1.',
        )
    if run.kernels.dynamo_backend != "no":
        yield Problem(
            option,
            f'`enable_group_offload` is true beside "dynamo_backend": "{run.kernels.dynamo_backend}".',
            "compiled blocks are bound to the place of their weights.",
            'Set "enable_group_offload" to false, or "dynamo_backend" to "no".',
        )


def check_hardware(run: Run) -> Iterator[Problem]:
    """What this machine cannot do."""
    yield from missing_kernels(run.hardware)
    device = run.hardware.device
    if run.kernels.dynamo_backend == "cudagraphs" and device != "cuda":
        yield Problem(
            "dynamo_backend",
            f'`dynamo_backend` is "cudagraphs", but this machine computes on {device}.',
            "it records CUDA's calls.",
            'Set it to "inductor" or "no".',
        )
    if (why := _lacks_kernel(run)) and run.kernels.attention_mechanism != "diffusers":
        mechanism = run.kernels.attention_mechanism
        what = f'`attention_mechanism` is "{mechanism}", which this run cannot use on {run.hardware.name or device}.'
        yield Problem("attention_mechanism", what, why, 'Set it to "diffusers", which takes the best kernel that there is.')


def _lacks_kernel(run: Run) -> str:
    """Why the attention kernel is not to be had; "" if it is."""
    mechanism, hardware = run.kernels.attention_mechanism, run.hardware
    if hardware.device != "cuda":
        if mechanism in CUDA_ATTENTION:
            return "only CUDA has that kernel."
        return "Apple's GPUs have one kernel, their own." if hardware.device == "mps" and mechanism == "native-flash" else ""
    if mechanism == "cudnn" and hardware.capability is None:
        return "cuDNN is NVIDIA's."
    if mechanism in ("native-flash", "cudnn"):
        if hardware.capability is not None and hardware.capability < AMPERE:
            return "that kernel begins with NVIDIA's Ampere cards (compute capability 8.0)."
        if run.dtypes.base not in HALF and run.dtypes.autocast is None:
            return f"that kernel computes in bf16 and fp16 only, and this run in {run.dtypes.base}."
    return ""


def notices(run: Run) -> Iterator[str]:
    """Options that were asked for and change nothing here."""
    device, memory = run.hardware.device, run.memory
    if device == "cpu":
        for option in ("offload_during_startup", "enable_group_offload"):
            if dict(memory)[option]:
                yield f"`{option}` saves nothing here: this machine computes on the CPU, where the weights lie anyway."
    if memory.enable_group_offload and memory.group_offload_use_stream and device != "cuda":
        yield f"`group_offload_use_stream` has no effect here: streams are CUDA's, and this machine computes on {device}."
    has_tf32 = device == "cuda" and (run.hardware.capability is None or run.hardware.capability >= AMPERE)
    if run.kernels.disable_tf32 and not has_tf32:
        yield f"`disable_tf32` has no effect here: {run.hardware.name or device} has no TF32."
