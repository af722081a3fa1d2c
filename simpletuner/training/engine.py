"""Devices, ranks and gradients: the one module that imports accelerate.

Accelerate brings the process group, the device and DDP, as its launcher or torchrun set them up. Precision, accumulation,
schedule and saving are ours. What ranks tell each other besides gradients goes over a CPU group, as bytes, without pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simpletuner.config.rules_memory import savings
from simpletuner.config.run import Hardware, Run
from simpletuner.data.samples import Cond
from simpletuner.errors import Interrupted, RunError, UserError
from simpletuner.families.base import ModelFamily
from simpletuner.networks.attention import preferring
from simpletuner.networks.compiling import compile_blocks
from simpletuner.training.jobs import Asked

__all__ = ["Engine", "Predict", "detect_hardware", "usable_cores"]

LONGEST_WAIT = timedelta(days=7)
"""One rank may index or encode for hours while the others wait."""

STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""What a container may use, on Linux with control groups of version 2: microseconds granted in each period."""


def detect_hardware() -> Hardware:
    """What this machine offers."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        return Hardware()
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if torch.version.cuda is None:  # ROCm's cards
            return Hardware("cuda", has_bf16=has_bf16, memory_bytes=torch.cuda.get_device_properties().total_memory)
        return Hardware(
            "cuda",
            has_bf16=has_bf16,
            capability=torch.cuda.get_device_capability(),
            built_for=tuple(torch.cuda.get_arch_list()),
            cuda_version=torch.version.cuda,
            name=torch.cuda.get_device_name(),
            memory_bytes=torch.cuda.get_device_properties().total_memory,
        )
    if torch.backends.mps.is_available():
        return Hardware("mps")
    return Hardware()


def usable_cores() -> int:
    """Cores that this process may really use: its affinity and its container's quota, not what the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_QUOTA.is_file():
        granted, period = CPU_QUOTA.read_text().split()
        if granted != "max":
            cores = min(cores, max(1, int(granted) // int(period)))
    return cores


class Predict(nn.Module):
    """What the loss calls: (x, t, cond) -> the denoiser's answer. DDP wraps this module; `denoiser` itself stays bare."""

    def __init__(self, family: ModelFamily, denoiser: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._family = family
        self._autocast = autocast

    def forward(self, x_BCHW: Tensor, t_B: Tensor, cond: Cond) -> Tensor:
        with torch.autocast(x_BCHW.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return self._family.predict(self.denoiser, x_BCHW, t_B, cond)


class Engine:
    """One process of a run. A context manager: the processes of a run that ends well leave together."""

    def __init__(self, run: Run) -> None:
        from accelerate import Accelerator  # a second that a message about the configuration should not wait for
        from accelerate.utils import DistributedDataParallelKwargs

        for variable, strategy in STRATEGIES.items():
            if os.environ.get(variable, "").lower() == "true":
                raise UserError(
                    f"accelerate is set up for {strategy}, but this version trains with plain data parallelism only.",
                    mend="run `accelerate config` and choose multi-GPU without it.",
                )
        self._run = run
        self._autocast = getattr(torch, run.dtypes.autocast) if run.dtypes.autocast else None
        # No precision for accelerate: weights lie in their formats already. `cpu`: without it torchrun on a machine with no
        # accelerator starts as many independent trainings as it has processes, silently (accelerate 1.15).
        self._accelerator = Accelerator(
            cpu=detect_hardware().device == "cpu",
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        self.rank: int = self._accelerator.process_index
        self.ranks: int = self._accelerator.num_processes
        self.device = str(self._accelerator.device)
        self._set_tf32(False)  # cuDNN's convolutions would encode pictures in it: torch's own default
        self._cpu_group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if self.ranks > 1 else None
        self._predict: nn.Module | None = None
        # On the CPU too: float16's range is as small there. And for a quantised base whose arithmetic alone is in it.
        is_scaled = run.precision.mixed_precision == "fp16" or run.dtypes.base == "float16"
        self._scaler = torch.amp.GradScaler(self.device.partition(":")[0]) if is_scaled else None
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        wanted = run.precision.mixed_precision
        self.notices: tuple[str, ...] = ()
        if launched not in {"no", wanted}:
            self.notices = (
                f'accelerate was launched with precision "{launched}"; the run\'s own mixed_precision "{wanted}" holds.',
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise RunError(
                "The memory of the device is full.",
                why=str(error).splitlines()[0],
                mend=f"{'; or '.join(savings(self._run))}. What was saved is whole.",
            ) from error
        # A rank that leaves early makes the launcher end the others. After an error there is nobody to wait for.
        if error is None or isinstance(error, Interrupted):
            self.barrier()
            self._accelerator.end_training()

    # what ranks tell each other

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self._cpu_group is not None:
            dist.barrier(group=self._cpu_group)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, on every rank. Values must survive JSON."""
        if self._cpu_group is None:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self._cpu_group)
        longest = max(int(length) for length in lengths)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.ranks)]
        dist.all_gather(padded, nn.functional.pad(text, (0, longest - len(text))), group=self._cpu_group)
        return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in zip(padded, lengths, strict=True)]

    def agree(self, asked: Asked) -> Asked:
        """What any rank was asked, all ranks do: only one of them may have got the signal."""
        if self._cpu_group is None:
            return asked
        flags = torch.tensor([int(flag) for flag in dataclasses.astuple(asked)], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._cpu_group)
        signal_number, save, validate = flags.tolist()
        return Asked(signal_number, bool(save), bool(validate))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensor, on the device; the host does not wait for it."""
        if self.ranks > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    # gradients

    def prepare(self, family: ModelFamily, denoiser: nn.Module) -> nn.Module:
        """Move the denoiser to the device; the module that the loss calls, its gradients shared between ranks.

        What was encoded before was computed without TF32, for caches outlive a run; what is trained now uses it.
        """
        self._set_tf32(not self._run.kernels.disable_tf32)
        backend = self._run.kernels.dynamo_backend
        if backend != "no":
            compile_blocks(family.blocks(denoiser), backend)
        predict = Predict(family, denoiser, self._autocast)
        # Frozen weights are equal on all ranks already, and quantised ones could not be broadcast.
        frozen = [name for name, parameter in predict.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in predict.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(predict, frozen)
        memory = self._run.memory
        if memory.enable_group_offload:
            self._offload(family, denoiser)
        with warnings.catch_warnings():
            # Torch 2.13 deprecates `broadcast_buffers` with the advice to keep it off until there is an `init_sync_buffers`.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._predict = self._accelerator.prepare_model(predict, device_placement=not memory.enable_group_offload)
        return self._predict

    def _offload(self, family: ModelFamily, denoiser: nn.Module) -> None:
        from simpletuner.networks.offload import move_others, offload_blocks  # imports diffusers

        memory = self._run.memory
        offloaded = offload_blocks(
            family.blocks(denoiser),
            self.device,
            blocks_per_group=memory.group_offload_blocks_per_group,
            is_pinned=memory.group_offload_use_stream and self.device.startswith("cuda"),
        )
        move_others(denoiser, offloaded, self.device)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """What is encoded in the block while training is what was encoded before it: to the bit, whatever training uses."""
        was_on = self._is_tf32
        self._set_tf32(False)
        try:
            yield
        finally:
            self._set_tf32(was_on)

    def _set_tf32(self, is_on: bool) -> None:
        self._is_tf32 = is_on
        if self.device.startswith("cuda"):
            # By the older of torch's two interfaces: after the newer one (`fp32_precision`) torch's own inductor cannot ask
            # for the precision any more, and raises (torch 2.13).
            torch.set_float32_matmul_precision("high" if is_on else "highest")
            torch.backends.cudnn.allow_tf32 = is_on

    def attention(self) -> AbstractContextManager[Any]:
        """Attention by the kernel that the run prefers, inside."""
        return preferring(self._run.kernels.attention_mechanism)

    def seed(self, seed: int) -> None:
        """Start the generators that a step draws from, the CPU's and the device's."""
        # Not by `torch.manual_seed`: for each kind of device that this machine lacks it notes a stack trace, which makes a
        # millisecond a step (torch 2.13).
        torch.default_generator.manual_seed(seed)
        if self.device.startswith("cuda"):
            torch.cuda.manual_seed(seed)
        elif self.device == "mps":
            torch.mps.manual_seed(seed)

    def to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on this rank's device, without waiting for the copy."""
        if not self.device.startswith("cuda"):
            return tensor.to(self.device)
        # From pageable memory the driver may first wait for all work in the stream.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Round forward and backward of one micro-batch: gradients meet at the last one of an optimiser step only.

        Both use the attention kernel of the run: a recomputed block must do what it did at first.
        """
        assert self._predict is not None, "prepare() comes first"
        with self.attention(), nullcontext() if last else self._accelerator.no_sync(self._predict):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; in float16 those of a scaled loss, else the small ones would be lost."""
        # Not through accelerate: it divides by an accumulation count of its own, which its launcher may have set.
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the loss's scale off the gradients, before anything looks at them. Once in an optimiser step."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights; in float16 not if a gradient overflowed, and the scale is then halved.

        All ranks decide alike: they hold the same averaged gradients, in which one rank's overflow is everybody's.
        """
        if self._scaler is None:
            optimizer.step()
            return
        self._scaler.step(optimizer)
        self._scaler.update()

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled, so that a step may be skipped."""
        return self._scaler is not None

    def scaler_state(self) -> dict[str, Any]:
        """The scale and how long it has held, for a checkpoint; empty where nothing is scaled."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def restore_scaler(self, state: Mapping[str, Any]) -> None:
        """Go on with the scale that `scaler_state` gave."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(dict(state))

    def clip(self, parameters: Iterable[nn.Parameter], limit: float, *, method: str = "norm") -> Tensor:
        """The global gradient norm, after which `limit` holds by `grad_clip_method` (0: as it is). Stays on the device."""
        parameters = list(parameters)
        # In float32: torch's own norm keeps the format of the gradients, whose bfloat16 knows three digits. And in one call:
        # a kernel for each of a thousand gradients keeps the host busy.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        at_once = self.device == "cpu" or None  # torch takes its calls over lists by itself on GPUs only
        if limit > 0 and method == "norm":
            nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=at_once)
        elif limit > 0:
            nn.utils.clip_grad_value_(parameters, limit, foreach=at_once)
        return norm

    def peak_memory_gib(self) -> float | None:
        """The most that tensors took on the device so far; None where torch does not count it."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.startswith("cuda") else None

    def memory_gib(self) -> float | None:
        """What the device has; None where torch does not say."""
        if not self.device.startswith("cuda"):
            return None
        return torch.cuda.get_device_properties(self.device).total_memory / 2**30
