"""What is wrong between the options of memory, kernels and number formats, and which of them have no effect on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config import rules_attention
from simpletuner.config.hardware import COMPILERS, has_compiler, missing_kernels
from simpletuner.config.run import Run
from simpletuner.errors import Problem

__all__ = ["check", "check_hardware", "notices", "savings"]

AMPERE = (8, 0)


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
    elif run.kernels.dynamo_backend == "inductor" and not has_compiler():
        yield Problem(
            "dynamo_backend",
            f'`dynamo_backend` is "inductor", and there is no C++ compiler ({", ".join(COMPILERS)}).',
            "it writes code that one has to translate.",
            'Install one, or set it to "no".',
        )
    yield from rules_attention.check_hardware(run)


def notices(run: Run) -> Iterator[str]:
    """Options that were asked for and change nothing here."""
    device, memory = run.hardware.device, run.memory
    if device == "cpu":
        for option in ("offload_during_startup", "enable_group_offload"):
            if dict(memory)[option]:
                yield f"`{option}` saves nothing here: this machine computes on the CPU, where the weights lie anyway."
    if memory.enable_group_offload and memory.group_offload_use_stream and device != "cuda":
        yield f"`group_offload_use_stream` has no effect here: streams are CUDA's, and this machine computes on {device}."
    yield from rules_attention.notices(run)
    has_tf32 = device == "cuda" and (run.hardware.capability is None or run.hardware.capability >= AMPERE)
    if run.kernels.disable_tf32 and not has_tf32:
        yield f"`disable_tf32` has no effect here: {run.hardware.name or device} has no TF32."


def savings(run: Run) -> Iterator[str]:
    """What to change where the device's memory is full: only what is not so already, what costs least first."""
    memory, is_adapter = run.memory, run.model.model_type == "lora"
    if any((dataset.train_batch_size or run.training.train_batch_size) > 1 for dataset in run.datasets):
        yield "lower train_batch_size (gradient_accumulation_steps makes up for it)"
    if not memory.gradient_checkpointing or memory.gradient_checkpointing_interval > 1:
        yield "set gradient_checkpointing to true and gradient_checkpointing_interval to 1"
    if is_adapter and run.precision.base_model_precision == "no_change":
        yield "store the base in fewer bits (base_model_precision)"
    if live := list(_live(run)):
        yield f"encode ahead of the training, so that no encoder stays beside it ({' and '.join(live)})"
    if is_adapter and not memory.enable_group_offload:
        yield "keep the base in ordinary memory (enable_group_offload)"
    if not is_adapter:
        yield 'train an adapter (model_type "lora") in place of the whole model'
    if not memory.offload_during_startup:
        yield "if it happened while prompts or pictures were encoded: offload_during_startup"
    if run.has_tiles and not memory.vae_enable_tiling:
        yield "if it happened while pictures were encoded or painted: vae_enable_tiling"
    yield "take smaller pictures (resolution, validation_resolution) or fewer at once (vae_batch_size)"


def _live(run: Run) -> Iterator[str]:
    """The options by which encoders stay in memory while training."""
    if run.text_embeds.text_cache_disable or run.text_embeds.text_cache_ondemand:
        yield f"text_cache_{'disable' if run.text_embeds.text_cache_disable else 'ondemand'} false"
    if any(dataset.vae_cache_disable for dataset in run.picture_sets):
        yield "vae_cache_disable false"
    if any(dataset.vae_cache_ondemand for dataset in run.picture_sets):
        yield "vae_cache_ondemand false"
