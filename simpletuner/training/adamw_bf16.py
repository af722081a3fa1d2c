"""AdamW for weights kept in bfloat16: arithmetic in float32, results rounded stochastically.

Rounding to the nearest would lose nearly every update (at 1.0 a bf16 weight moves in steps of 0.0078) and would freeze the
second moment, whose relative change per step (0.001) is below bf16's precision (0.004). A result rounded up or down at random,
in proportion to how near each neighbour is, is right on average: weights drift and both moments decay as they should. So both
moments are bf16 too, 8 bytes a parameter with weight and gradient; the rounding noise of the second one settles at 3 to 4 %
(a test measures it), which its square root halves. Weights in float32 get plain AdamW from the same lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from simpletuner.data.samples import draw_seed

__all__ = ["AdamWBF16", "rounded_stochastically"]

CHUNK_ELEMENTS = 1 << 24
"""Parameters are updated together up to this many elements: an adapter's hundreds of small matrices in a few kernels, a large
network without doubling its memory."""


class AdamWBF16(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019). Rounding is keyed by step and place, so it repeats."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. Never waits for the device."""
        assert closure is None, "a second evaluation is nothing that AdamW asks for"
        for place, group in enumerate(self.param_groups):
            for index, (step, chunk) in enumerate(self._chunks(group["params"])):
                self._update(chunk, step, group, self._generator(chunk[0].device, draw_seed("adamw_bf16", step, place, index)))

    def _chunks(self, parameters: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Parameters that can be updated together, with the number of the step that they take."""
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            state["step"] += 1
            alike.setdefault((state["step"], parameter.device, parameter.dtype), []).append(parameter)
        for (step, _, _), members in alike.items():
            chunk: list[Tensor] = []
            elements = 0
            for parameter in members:
                if chunk and elements + parameter.numel() > CHUNK_ELEMENTS:
                    yield step, chunk
                    chunk, elements = [], 0
                chunk.append(parameter)
                elements += parameter.numel()
            yield step, chunk

    def _generator(self, device: torch.device, seed: int) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(seed)

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any], generator: torch.Generator) -> None:
        firsts = [self.state[parameter]["exp_avg"] for parameter in parameters]
        seconds = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        gradient = _flat([parameter.grad for parameter in parameters if parameter.grad is not None])
        weight, first, second = _flat(parameters), _flat(firsts), _flat(seconds)

        beta1, beta2 = group["betas"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))

        for flat, targets in ((weight, parameters), (first, firsts), (second, seconds)):
            if targets[0].dtype == torch.bfloat16:
                flat = rounded_stochastically(flat, generator)
            pieces = flat.split([target.numel() for target in targets])
            torch._foreach_copy_(targets, [piece.view(target.shape) for piece, target in zip(pieces, targets, strict=True)])


def rounded_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random so that the mean is `x`.

    bfloat16 is the upper half of a float32: noise, uniform in the lower half, carries into the upper one as often as it should.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    # CUDA's NaN is 0x7FFFFFFF: the noise would carry it over into -0.0, and a broken run would go on with zeros.
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(torch.float32)
