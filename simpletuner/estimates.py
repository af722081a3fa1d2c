"""What a run will take of memory, counted on the meta device: real shapes and formats, no weights, nothing computed.

Encoders are lent one after another, and the denoiser comes after them, so the largest of these stages rules. Encoders of what
is not cached ahead stay, and lie beside all that comes after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.run import Run
from simpletuner.data.samples import Embeds, PictureEncoder, Place, TextEncoder
from simpletuner.families import load as load_family
from simpletuner.families.base import ModelFamily
from simpletuner.networks.checkpointing import checkpoint_blocks
from simpletuner.networks.counting import PeakBytes, on_meta, stored_bytes
from simpletuner.networks.quantise import saved_bytes
from simpletuner.training.tuning import build_tuning

__all__ = ["GIB", "Largest", "Memory", "Stage", "Workload", "heaviest", "item_bytes", "memory_of", "training_stage"]

GIB = 2**30
PROCESS_BYTES = int(1.5 * GIB)
"""Python, torch and the libraries, before any weight (measured: 1.0 GiB on a CPU, more with CUDA)."""
AVERAGE_BYTES = 4
"""Of the EMA, for each trained weight."""


@dataclass(frozen=True)
class Largest:
    """The most that a run computes on at once."""

    size_WH: tuple[int, int]
    """Of pictures in pixels."""
    batch: int


def heaviest(each: Iterable[Largest]) -> Largest:
    """The one with the most pixels at once; of equal ones that with the most pictures, for each has its prompt."""
    return max(each, key=lambda one: (one.size_WH[0] * one.size_WH[1] * one.batch, one.batch))


@dataclass(frozen=True)
class Workload:
    """What a run computes on, as far as its memory depends on it."""

    trained: Sequence[Largest]
    """What a step holds, of each set at its largest."""
    answered: Sequence[Largest] = ()
    """What the denoiser answers at once between two steps, without gradients: for the eval loss, and for the gallery."""
    encoded: Sequence[Largest] = ()
    """What is encoded at once of each set's pictures."""
    prompts: int = 1
    """How many texts there are."""
    is_live: bool = False
    """Whether pictures of some set are encoded while training, so that what encodes them stays."""
    held_bytes: int = 0
    """Of ordinary memory, for what is encoded while training and not cached."""


@dataclass(frozen=True)
class Stage:
    """One part of a run that has the device to itself, in bytes."""

    name: str
    weights_bytes: int
    """What lies there all the time: weights, and in training the optimiser's state and the average."""
    work_bytes: int
    """The most that comes on top: activations, and in training gradients."""
    ram_bytes: int = 0
    """What lies in ordinary memory meanwhile."""
    network_bytes: int = 0
    """Of an encoder's own weights as they are loaded, wherever they come to lie."""
    trained_bytes: int = 0
    """Of the weights that training moves: a part of all, wherever it lies."""
    state_bytes: int = 0
    """Of the optimiser's state, likewise."""
    average_bytes: int = 0
    """Of the EMA, likewise."""

    @property
    def device_bytes(self) -> int:
        """At most, on the device."""
        return self.weights_bytes + self.work_bytes


@dataclass(frozen=True)
class Memory:
    """Of all stages."""

    stages: tuple[Stage, ...]
    otherwise: Stage
    """Training with `gradient_checkpointing` turned round."""
    is_shared: bool
    """Whether the device's memory is the machine's own: a CPU, or Apple's."""
    staying: tuple[str, ...] = ()
    """The stages whose encoders stay beside the training."""

    @property
    def training(self) -> Stage:
        """The last of the stages."""
        return self.stages[-1]

    @property
    def device_bytes(self) -> int:
        """The most that the run takes on the device; kernels and the allocator come on top, about a tenth."""
        return max(stage.device_bytes for stage in self.stages)

    @property
    def ram_bytes(self) -> int:
        """The most that it takes of ordinary memory."""
        most = max(stage.ram_bytes + (stage.device_bytes if self.is_shared else 0) for stage in self.stages)
        return PROCESS_BYTES + most


def memory_of(run: Run, work: Workload) -> Memory:
    """All stages in their order, the training last."""
    family = load_family(run)
    size = min(run.text_embeds.text_encoder_batch_size, max(work.prompts, 1))
    is_live_text = run.text_embeds.filled != "before"
    pictures = [family.image_encoder(), *(encoder for encoder, _ in filter(None, [family.image_prompts()]))]
    lent = [(text_stage(run, encoder, size), is_live_text) for encoder in family.text_encoders()]
    lent += [(image_stage(run, encoder, work.encoded), work.is_live) for encoder in pictures]
    stages, staying = [], list[Stage]()
    for stage, stays in lent:
        stages.append(beside(run, stage, staying))
        staying += [stage] if stays else []
    memory = run.memory.model_copy(update={"gradient_checkpointing": not run.memory.gradient_checkpointing})
    other = replace(run, memory=memory)
    training, otherwise = (
        beside(each, training_stage(each, load_family(each), work.trained, work.answered), staying) for each in (run, other)
    )
    training, otherwise = (replace(each, ram_bytes=each.ram_bytes + work.held_bytes) for each in (training, otherwise))
    names = tuple(stage.name for stage in staying)
    return Memory((*stages, training), otherwise, is_shared=run.hardware.device in ("cpu", "mps"), staying=names)


def beside(run: Run, stage: Stage, staying: Sequence[Stage]) -> Stage:
    """The stage as it is while these encoders stay. Between two passes of training one of them is at work."""
    work = stage.work_bytes
    if stage.trained_bytes:
        gradients = stage.trained_bytes if _keeps_gradients(run) else 0
        work = max([work, *(gradients + each.work_bytes for each in staying)])
    return replace(
        stage,
        weights_bytes=stage.weights_bytes + sum(each.weights_bytes for each in staying),
        work_bytes=work,
        # on their way to the device the others were in ordinary memory too, and have left it
        ram_bytes=stage.ram_bytes + sum(each.ram_bytes for each in staying if run.memory.offload_during_startup),
    )


def text_stage(run: Run, encoder: TextEncoder, size: int) -> Stage:
    """A text encoder at `size` prompts of full length."""
    network = encoder.hollow()
    weights = bytes_of(network) - saved_bytes(network, encoder.precision)
    work = peak_of(lambda: encoder.rehearse(network, size))
    return _lent(run, f"text encoder {_name(network)}", weights, bytes_of(network), work)


def image_stage(run: Run, encoder: PictureEncoder, encoded: Sequence[Largest]) -> Stage:
    """What encodes pictures, at the largest of what is encoded at once."""
    network = encoder.hollow()
    work = 0
    for largest in encoded:
        width, height = largest.size_WH
        size = 1 if run.memory.vae_enable_slicing else largest.batch

        def encode(shape: tuple[int, ...] = (size, 3, height, width)) -> Any:
            return encoder.rehearse(network, torch.zeros(shape))

        work = max(work, peak_of(encode))
    return _lent(run, f"image encoder {_name(network)}", bytes_of(network), bytes_of(network), work)


def _lent(run: Run, name: str, weights: int, loaded: int, work: int) -> Stage:
    if run.memory.offload_during_startup:  # each layer visits the device alone: next to nothing beside the activations
        return Stage(name, 0, work, weights, network_bytes=loaded)
    return Stage(name, weights, work, 0 if run.hardware.device in ("cpu", "mps") else loaded, network_bytes=loaded)


def item_bytes(encoder: PictureEncoder) -> int:
    """Bytes of what an encoder makes of a picture whose size does not matter."""
    network = encoder.hollow()
    with on_meta(), torch.no_grad():
        return encoder.rehearse(network, torch.zeros(1, 3, 1, 1)).nbytes


def training_stage(run: Run, family: ModelFamily, trained: Sequence[Largest], answered: Sequence[Largest] = ()) -> Stage:
    """A step of training in the steady state, or what is asked of it between two steps if that takes more.

    Where autocast computes, its copies of the weights are counted beside.
    """
    counted, dtypes = run, run.dtypes
    if dtypes.autocast is not None:
        counted = replace(run, dtypes=replace(dtypes, base=dtypes.autocast, trained=dtypes.autocast, autocast=None))
        family = type(family)(counted)
    counted = replace(counted, adapter=counted.adapter.model_copy(update={"init_lora": None}))
    with on_meta():
        denoiser: Any = family.load_denoiser(is_hollow=True)
        frozen = bytes_of(denoiser) - saved_bytes(denoiser, run.precision.base_model_precision, keep=family.kept_whole)
        tuning = build_tuning(family, denoiser, counted)
        parameters = tuning.parameters().values()
        if run.memory.gradient_checkpointing:  # again: the backward pass leaves what is set up here
            blocks, interval = family.blocks(denoiser), run.memory.gradient_checkpointing_interval
            checkpoint_blocks(denoiser, blocks, interval, recomputing=on_meta)
        if run.model.model_type == "full":
            frozen = stored_bytes(denoiser.buffers())
        inputs = _inputs(family, heaviest(trained))
        work = peak_of(lambda: _step(family, denoiser, inputs, parameters, twice=_keeps_gradients(run)), is_trained=True)
        if answered:
            inputs = _inputs(family, heaviest(answered))
            kept = 0 if run.memory.set_grads_to_none else stored_bytes(parameters)
            work = max(work, kept + peak_of(lambda: _answered(family, denoiser, inputs)))
    numbers = sum(parameter.numel() for parameter in parameters)
    trained_bytes = numbers * getattr(torch, dtypes.trained).itemsize
    if dtypes.autocast is not None:
        work += trained_bytes - stored_bytes(parameters)  # of the gradients, which are in the weights' own format
        work += stored_bytes(denoiser.parameters())  # copies that the backward pass needs
        frozen *= getattr(torch, dtypes.base).itemsize // getattr(torch, dtypes.autocast).itemsize
    return _placed(run, family, denoiser, frozen=frozen, numbers=numbers, trained=trained_bytes, work=work)


def _placed(run: Run, family: ModelFamily, denoiser: nn.Module, *, frozen: int, numbers: int, trained: int, work: int) -> Stage:
    """What lies where."""
    assert run.optimizer.optimizer is not None, "config/derive.py fills in optimizer"
    row = OPTIMIZERS[run.optimizer.optimizer]
    state = round(numbers * row.state_bytes[run.dtypes.trained != "bfloat16"])
    average = numbers * AVERAGE_BYTES if run.ema.use_ema else 0
    on_device, in_ram = {"weights": frozen + trained, "state": state, "average": average}, 0
    if run.hardware.device == "cuda":
        if row.unpaged:
            in_ram += on_device.pop("state")
        if run.ema.ema_device == "cpu":
            in_ram += on_device.pop("average")
    if run.memory.enable_group_offload and run.hardware.device != "cpu":
        share = 1 - _visiting(family, denoiser, run.memory.group_offload_blocks_per_group)
        on_device["weights"] -= round(frozen * share)
        in_ram += round(frozen * share)
    loading = 0 if run.hardware.device in ("cpu", "mps") else bytes_of(denoiser)  # it is read into ordinary memory first
    is_checkpointed = run.memory.gradient_checkpointing
    name = f"training {'with' if is_checkpointed else 'without'} gradient_checkpointing"
    held = {"trained_bytes": trained, "state_bytes": state, "average_bytes": average}
    return Stage(name, sum(on_device.values()), work, max(in_ram, loading), **held)


def _visiting(family: ModelFamily, denoiser: nn.Module, blocks_per_group: int) -> float:
    """The share of the denoiser's weights that is on the device while its blocks are offloaded: the rest, and one group."""
    blocks = [bytes_of(block) for block in family.blocks(denoiser)]
    whole = bytes_of(denoiser)
    return (whole - sum(blocks) + max(blocks) * blocks_per_group) / whole


def _keeps_gradients(run: Run) -> bool:
    """Whether gradients of former passes lie beside a pass's activations."""
    return run.training.gradient_accumulation_steps > 1 or not run.memory.set_grads_to_none


def _inputs(family: ModelFamily, largest: Largest) -> tuple[Any, ...]:
    """Latents, times and conditions, of prompts at their longest."""
    embeds: Embeds = {}
    for encoder in family.text_encoders():
        embeds.update(encoder.longest())
    size_WH = largest.size_WH
    place = Place(size_WH, size_WH, (0, 0), size_WH)
    cond = family.collate([embeds] * largest.batch, [place] * largest.batch)
    x_BCHW = torch.zeros(largest.batch, family.latent.channels, *family.latent.grid(*size_WH))
    return x_BCHW, torch.zeros(largest.batch), cond


def _step(
    family: ModelFamily, denoiser: nn.Module, inputs: tuple[Any, ...], parameters: Iterable[nn.Parameter], *, twice: bool
) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if twice else None
    x_BCHW, t_B, cond = inputs
    noisy_BCHW, target_BCHW = x_BCHW + 0, x_BCHW + 0  # as in training: noise, what is made of it, and what is asked for
    answer_BCHW = family.predict(denoiser, noisy_BCHW, t_B, cond)
    (answer_BCHW.float() - target_BCHW).square().mean().backward()


def _answered(family: ModelFamily, denoiser: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A batch of the eval loss, or a step of the gallery's sampler: nothing is kept for a backward pass."""
    x_BCHW, t_B, cond = inputs
    noise_BCHW, noisy_BCHW = x_BCHW + 0, x_BCHW + 0
    answer_BCHW = family.predict(denoiser, noisy_BCHW, t_B, cond)
    (answer_BCHW.float() - noise_BCHW).square().mean()


def peak_of(work: Callable[[], Any], *, is_trained: bool = False) -> int:
    """The most bytes that `work` holds at one time, beyond what was there."""
    with on_meta(), PeakBytes() as counted, nullcontext() if is_trained else torch.no_grad():
        kept = work()
    del kept
    return counted.peak


def bytes_of(network: nn.Module) -> int:
    """Of its weights and buffers; shared ones count once."""
    held: list[Tensor] = [*network.parameters(), *network.buffers()]
    return stored_bytes(held)


def _name(network: nn.Module) -> str:
    return type(network).__name__
