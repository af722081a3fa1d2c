"""Memory against speed."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options import Section, option

__all__ = ["Memory"]


class Memory(Section):
    """Trading speed for memory."""

    gradient_checkpointing: bool = option(True, level="essential")
    """Recompute block activations in the backward pass instead of keeping them: much less memory, about a third slower."""

    gradient_checkpointing_interval: int = option(1, ge=1, when="gradient_checkpointing=true")
    """Recompute every n-th block only: 1 all, 2 half of them, 3 a third. Memory and speed lie in between."""

    set_grads_to_none: bool = option(True)
    """Free the gradients' memory after each step. `false` keeps it, filled with zeros; a weight that gets no gradient in some
    step then still moves there by its momentum and decay."""

    vae_enable_slicing: bool = option(False)
    """Encode and decode one picture at a time, whatever `vae_batch_size` is: less memory, slower. Latents change in the last
    bit at most, so cached ones are kept."""

    vae_enable_tiling: bool = option(False)
    """Encode and decode pictures in overlapping tiles of 512 px: much less memory for pictures of 1024 px and more. Latents
    change a little near the seams, so they are cached anew."""

    offload_during_startup: bool = option(False)
    """While prompts and pictures are encoded, the encoder's weights stay in CPU memory, and each layer visits the device when
    it is needed: slow, but an encoder larger than the device's memory passes."""

    enable_group_offload: bool = option(False, when="model_type=lora")
    """Keep the frozen weights of the denoiser's blocks in CPU memory; they visit the device when they are needed. Needs
    `gradient_checkpointing` with interval 1."""

    group_offload_type: Literal["block_level", "leaf_level"] = option("block_level", when="enable_group_offload=true")
    """What visits the device together: groups of whole blocks. `leaf_level`, single layers, is refused: the backward pass
    needs all layers of a block at once, so it would only be slower."""

    group_offload_blocks_per_group: int = option(1, ge=1, when="enable_group_offload=true")
    """Blocks that visit the device together."""

    group_offload_use_stream: bool = option(False, level="experimental", when="enable_group_offload=true")
    """Keep the offloaded weights in pinned memory and copy them without waiting; nothing is copied back. Faster, on CUDA only;
    pinned memory cannot be swapped out."""
