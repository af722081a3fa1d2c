"""A frozen model's large weights in few bits: linear layers and convolutions, each decoded for the moment it is used.

Adapters are put in afterwards and train through it. What is stored are buffers, so nothing of it is ever trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from simpletuner.config.catalogue import PRECISIONS
from simpletuner.errors import UserError
from simpletuner.networks.codecs import CODECS, Codec

__all__ = ["Outcome", "QuantisedConv2d", "QuantisedLinear", "quantise", "saved_bytes", "stored_bytes"]


@dataclass(frozen=True)
class Outcome:
    """What `quantise` did."""

    quantised: int
    """Layers."""
    kept: int
    """Layers that could have been, and stay whole: by name, or since the format does not take their shape."""
    bytes_before: int
    bytes_after: int
    """Of all parameters and buffers of the model."""

    @property
    def summary(self) -> str:
        """ "276 layers quantised, 12 kept whole: 3.02 GiB -> 1.60 GiB"."""
        kept = f", {self.kept:,} kept whole" if self.kept else ""
        return f"{self.quantised:,} layers quantised{kept}: {_size(self.bytes_before)} -> {_size(self.bytes_after)}"


def quantise(model: nn.Module, precision: str, *, keep: Sequence[str] = (), device: str = "cpu") -> Outcome:
    """Store the weights of `model` in place as `precision` says (a name of the catalogue; "no_change" does nothing).

    Layer by layer on `device`, where what was quantised stays: there is never more than one unquantised layer there. `keep`
    are patterns (fnmatch) of the names of layers that stay as they are. Raises UserError where nothing could be quantised.
    """
    before = stored_bytes(model)
    layers = list(_layers(model))
    if precision == "no_change":
        return Outcome(0, len(layers), before, before)
    chosen = list(_chosen(model, precision, keep))
    for name in chosen:
        model.set_submodule(name, _quantised(model.get_submodule(name), CODECS[precision], device))
    if not (quantised := len(chosen)):
        raise UserError(
            f"Nothing of {type(model).__name__} can be stored as {precision}.",
            why=f"none of its {len(layers)} linear and convolution layers has a size that this format takes.",
            mend='choose another format, such as "int8-quanto", or "no_change".',
        )
    return Outcome(quantised, len(layers) - quantised, before, stored_bytes(model))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what two names share counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def saved_bytes(model: nn.Module, precision: str, *, keep: Sequence[str] = ()) -> int:
    """What `quantise` would take off the model, by the bits of the catalogue. Nothing is quantised, no weight need be there."""
    if precision == "no_change":
        return 0
    bits = PRECISIONS[precision].bits
    weights = [model.get_parameter(f"{name}.weight") for name in _chosen(model, precision, keep)]
    return round(sum(weight.numel() * (weight.element_size() - bits / 8) for weight in weights))


class Stored(nn.Module):
    """One weight in few bits. Its parts are plain buffers: they move, and are offloaded, like any other."""

    def __init__(self, weight: Tensor, codec: Codec) -> None:
        super().__init__()
        self.codec = codec
        self.shape = tuple(weight.shape)
        self.dtype = weight.dtype
        self.names = []
        for name, part in codec.encode(weight.flatten(1)).items():
            self.register_buffer(name, part)
            self.names.append(name)

    def parts(self) -> list[Tensor]:
        """What is stored, in the order of `names`."""
        return [self.get_buffer(name) for name in self.names]

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight that `parts` mean."""
        rows, *others = self.shape
        columns = torch.Size(others).numel()
        weight = self.codec.decode(dict(zip(self.names, parts, strict=True)), (rows, columns), self.dtype)
        return weight.view(self.shape)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in few bits. Reading `weight` decodes it."""

    def __init__(self, layer: nn.Linear, codec: Codec, device: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.stored = Stored(layer.weight.detach().to(device), codec)
        self.register_parameter("bias", _frozen(layer.bias, device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the stored bits mean, decoded anew. Adapters that need the base's values (DoRA) read it."""
        return self.stored.whole(self.stored.parts())

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)

    def answer(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer gives with this weight."""
        return functional.linear(x, weight, self.bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of its input, of the given shape."""
        return gradient @ weight.to(gradient.dtype)


class QuantisedConv2d(nn.Conv2d):
    """A frozen convolution whose kernel is stored in few bits, as the matrix (outputs, inputs x rows x columns)."""

    def __new__(cls, *arguments: Any, **settings: Any) -> Any:
        # For a LoRA beside a convolution, peft 0.21.2 calls the base layer's own type with sizes: it gets a plain convolution.
        is_copied = not arguments or isinstance(arguments[0], nn.Conv2d)
        return super().__new__(cls) if is_copied else nn.Conv2d(*arguments, **settings)

    def __init__(self, layer: nn.Conv2d, codec: Codec, device: str) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(layer, name))
        self.stored = Stored(layer.weight.detach().to(device), codec)
        self.register_parameter("bias", _frozen(layer.bias, device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The kernel that the stored bits mean, decoded anew."""
        return self.stored.whole(self.stored.parts())

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)

    def answer(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer gives with this kernel."""
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of its input, of the given shape."""
        weight = weight.to(gradient.dtype)
        return conv2d_input(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)


def _forward(layer: QuantisedLinear | QuantisedConv2d, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Through.apply(x, layer, *layer.stored.parts())
    return layer.answer(x, layer.weight)


class _Through(torch.autograd.Function):
    """A layer's answer and its input's gradient. The decoded weight lives within each pass, and only the bits between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear | QuantisedConv2d, *parts: Tensor) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        # Not the buffers themselves: an offload that swaps their contents must not take them from the backward pass.
        ctx.save_for_backward(*(part.detach() for part in parts))
        return layer.answer(x, layer.stored.whole(parts))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        weight = ctx.layer.stored.whole(parts)
        return (ctx.layer.input_gradient(gradient, weight, ctx.shape).to(ctx.dtype), None, *(None for _ in parts))


def _layers(model: nn.Module) -> Iterator[str]:
    """Names of the layers whose weights are worth storing otherwise.

    Not those of grouped convolutions: a depthwise one has nine weights a channel. Embeddings and norms stay whole, too.
    """
    for name, module in model.named_modules():
        is_convolution = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
        if type(module) is nn.Linear or (is_convolution and not isinstance(module.padding, str)):
            yield name


def _chosen(model: nn.Module, precision: str, keep: Sequence[str]) -> Iterator[str]:
    """Names of the layers that are stored so."""
    for name in _layers(model):
        fits = CODECS[precision].fits(*_matrix_shape(model.get_submodule(name)))
        if fits and not any(fnmatchcase(name, pattern) for pattern in keep):
            yield name


def _matrix_shape(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def _quantised(layer: nn.Module, codec: Codec, device: str) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return QuantisedConv2d(layer, codec, device).train(layer.training)
    assert isinstance(layer, nn.Linear)
    return QuantisedLinear(layer, codec, device).train(layer.training)


def _frozen(bias: Tensor | None, device: str) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)


def _size(count: int) -> str:
    """ "1.60 GiB", "35.2 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
