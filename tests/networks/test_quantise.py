"""Against each library's own module or tensor, which decodes what it stored, and against float64.

Shape letters:  B samples,  I inputs,  O outputs.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.catalogue import PRECISIONS
from simpletuner.errors import UserError
from simpletuner.networks.codecs import CODECS
from simpletuner.networks.libraries import import_model_libraries, require_quietly
from simpletuner.networks.quantise import QuantisedConv2d, QuantisedLinear, quantise, stored_bytes

import_model_libraries()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGEST_ERROR = {8: 0.008, 4: 0.12, 2: 0.5}
"""Relative error (Frobenius) of normally distributed weights by bits: what uniform steps over a row's range must keep below."""
FP8_ERROR = 0.03  # three bits of mantissa: at most 1/16, on average 2.6 %


def weight_of(rows: int = 128, columns: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def linear(weight_OI: Tensor) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], dtype=weight_OI.dtype)
    layer.weight.data = weight_OI.clone()
    return layer.requires_grad_(False)


def quantised(layer: nn.Module, precision: str) -> Any:
    model = nn.Sequential(layer)
    quantise(model, precision)
    return model[0]


def by_quanto(weight_OI: Tensor, kind: str) -> Tensor:
    quanto = require_quietly("optimum.quanto", option="", extra="")
    if kind == "qint4" and weight_OI.dtype == torch.bfloat16:
        pytest.skip("there quanto itself stores the shift with loss, for a kernel of its own")
    layer = quanto.QLinear.from_module(linear(weight_OI), weights=quanto.qtypes[kind])
    with pytest.MonkeyPatch.context() as patched:  # unpacked, as its unpacking is C++ that would have to be compiled first
        patched.setattr(quanto.tensor.packed.PackedTensor, "pack", lambda codes, _bits: codes)
        layer.freeze()
        return layer.weight.dequantize()


def by_torchao(weight_OI: Tensor, config: str) -> Tensor:
    torchao = require_quietly("torchao.quantization", option="", extra="")
    layer = nn.Sequential(linear(weight_OI))
    torchao.quantize_(layer, getattr(torchao, config)(set_inductor_config=False))
    return layer[0].weight.dequantize()


def by_bitsandbytes(weight_OI: Tensor, _: str) -> Tensor:
    bnb = require_quietly("bitsandbytes", option="", extra="")
    weight = bnb.nn.Params4bit(weight_OI, requires_grad=False, quant_type="nf4").to("cpu")
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


THEIRS: dict[str, tuple[Callable[[Tensor, str], Tensor], str]] = {
    "int8-quanto": (by_quanto, "qint8"),
    "int4-quanto": (by_quanto, "qint4"),
    "int2-quanto": (by_quanto, "qint2"),
    "fp8-quanto": (by_quanto, "qfloat8_e4m3fn"),
    "int8-torchao": (by_torchao, "Int8WeightOnlyConfig"),
    "fp8-torchao": (by_torchao, "Float8WeightOnlyConfig"),
    "nf4-bnb": (by_bitsandbytes, ""),
}


def test_every_name_of_the_catalogue_has_its_codec_and_an_independent_judge() -> None:
    assert PRECISIONS.keys() == CODECS.keys() == THEIRS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_weight_is_what_the_library_itself_would_decode(precision: str, dtype: torch.dtype) -> None:
    weight_OI = weight_of(dtype=dtype)
    decode, argument = THEIRS[precision]
    ours = quantised(linear(weight_OI), precision).weight
    assert ours.dtype == dtype
    assert torch.equal(ours, decode(weight_OI, argument))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_weight_is_near_the_full_one(precision: str, dtype: torch.dtype) -> None:
    weight_OI = weight_of(dtype=dtype)
    error = (quantised(linear(weight_OI), precision).weight - weight_OI).float().norm() / weight_OI.float().norm()
    bound = FP8_ERROR if precision.startswith("fp8") else LARGEST_ERROR[int(PRECISIONS[precision].bits)]
    assert bound / 10 < error < bound


@pytest.mark.parametrize("precision", PRECISIONS)
def test_output_and_gradient_are_those_of_the_decoded_weight_in_float64(precision: str) -> None:
    layer = quantised(linear(weight_of()), precision)
    x_BI, gradient_BO = torch.randn(5, 256, requires_grad=True), torch.randn(5, 128)
    output_BO = layer(x_BI)
    output_BO.backward(gradient_BO)
    weight_OI = layer.weight.double()
    torch.testing.assert_close(output_BO.double(), x_BI.double() @ weight_OI.T + layer.bias.double(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x_BI.grad.double(), gradient_BO.double() @ weight_OI, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2, "dilation": 2}], ids=str
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_convolution_answers_and_hands_back_gradients_as_one_with_the_decoded_kernel(
    precision: str, settings: dict[str, Any]
) -> None:
    layer = nn.Conv2d(64, 32, **settings).requires_grad_(False)
    ours, x_BCHW = quantised(copy.deepcopy(layer), precision), torch.randn(2, 64, 7, 9)
    assert isinstance(ours, QuantisedConv2d)
    assert not torch.equal(ours.weight, layer.weight)
    layer.weight.data = ours.weight
    answers = []
    for module in (ours, layer):
        x = x_BCHW.clone().requires_grad_()
        answer = module(x)
        answer.square().sum().backward()
        answers.append((answer, x.grad))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_between_the_passes_no_decoded_weight_is_kept(precision: str) -> None:
    layer, kept = quantised(linear(weight_of(512, 512)), precision), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 512, requires_grad=True))
    held = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}.values())
    assert 0 < held <= stored_bytes(layer) < 512 * 512 * 4 / 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_of_zeros_stays_zero(precision: str) -> None:
    weight_OI = weight_of()
    weight_OI[3] = 0
    weight_OI[4, :128] = 0
    decoded_OI = quantised(linear(weight_OI), precision).weight
    assert torch.isfinite(decoded_OI).all()
    assert not decoded_OI[3].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_falls_to_the_bits_that_the_catalogue_names(precision: str) -> None:
    model = nn.Sequential(linear(weight_of(1024, 1024, torch.bfloat16)))
    model[0].bias = None
    outcome = quantise(model, precision)
    assert outcome.bytes_before == 1024 * 1024 * 2
    assert outcome.bytes_after == stored_bytes(model)
    table = 1024 + 4 if precision == "nf4-bnb" else 0  # the same for every size of layer
    assert (outcome.bytes_after - table) * 8 / 1024**2 == pytest.approx(PRECISIONS[precision].bits, abs=0.03)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_weights_give_the_same_bits(precision: str) -> None:
    first, second = (quantised(linear(weight_of()), precision).stored.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_on_the_gpu_it_is_what_it_would_be_from_the_cpu(precision: str) -> None:
    models = [nn.Sequential(linear(weight_of(dtype=torch.bfloat16))) for _ in range(2)]
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        quantise(model, precision, device=device)
    assert models[1][0].weight.is_cuda
    one, other = (model.to("cuda")[0].weight for model in models)
    torch.testing.assert_close(one, other, atol=0, rtol=2**-7)


class Model(nn.Module):
    """What networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.proj_in = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2)])
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.mixing = nn.Conv2d(64, 64, 1)
        self.wide = nn.Linear(200, 64)


def test_what_is_named_and_what_does_not_fit_stays_whole_and_is_counted() -> None:
    model = Model()
    outcome = quantise(model, "int4-quanto", keep=("proj_*", "blocks.1.*"))
    changed = {name for name, module in model.named_modules() if isinstance(module, (QuantisedLinear, QuantisedConv2d))}
    assert changed == {"blocks.0.0", "mixing"}  # 200 columns are no whole groups, a depthwise kernel is not worth it
    assert (outcome.quantised, outcome.kept) == (2, 3)
    assert outcome.summary.startswith("2 layers quantised, 3 kept whole: 0.1 MiB -> ")


def test_no_change_changes_nothing() -> None:
    model = Model()
    before = dict(model.named_modules())
    outcome = quantise(model, "no_change")
    assert dict(model.named_modules()) == before
    assert outcome.quantised == 0


def test_a_model_without_a_layer_to_quantise_is_an_error_with_a_mend() -> None:
    with pytest.raises(UserError, match=r"Nothing of Sequential can be stored as int4-quanto(?s:.)*Mend: "):
        quantise(nn.Sequential(nn.Linear(200, 4)), "int4-quanto")


def test_never_more_than_one_whole_layer_lies_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on `meta`, as the device: what arrives there, and what is there already."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    seen = []
    encode = CODECS["int8-quanto"].encode

    def counting(self: Any, weight: Tensor) -> Any:
        seen.append((weight.device.type, sum(isinstance(layer, QuantisedLinear) for layer in model)))
        return encode(weight)

    monkeypatch.setattr(type(CODECS["int8-quanto"]), "encode", counting)
    quantise(model, "int8-quanto", device="meta")
    assert seen == [("meta", done) for done in range(4)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_can_be_copied_moved_cast_and_compiled(precision: str) -> None:
    model = nn.Sequential(linear(weight_of()), nn.GELU(), linear(weight_of(64, 128)))
    quantise(model, precision)
    x_BI = torch.randn(3, 256)
    answer = model(x_BI)
    assert torch.equal(copy.deepcopy(model)(x_BI), answer)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x_BI), answer)
    assert {tensor.device.type for tensor in copy.deepcopy(model).to("meta").state_dict().values()} == {"meta"}
    assert stored_bytes(copy.deepcopy(model).to(torch.float64)) < 256 * 128 * 4, (
        "the codes are no floats that a cast would widen"
    )


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_lora_and_dora_learn_over_it_as_over_the_decoded_weight(precision: str, use_dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    results = []
    for is_whole in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 64), nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 64, 3), nn.Conv2d(64, 4, 1))
        quantise(model, precision)
        if is_whole:
            for place in (0, 2, 3):
                layer = model[place]
                plain = (
                    nn.Linear(256, 64) if place == 0 else nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)
                )
                plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
                model[place] = plain
        model.requires_grad_(False)
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "3"], use_dora=use_dora), model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.05)
        losses = []
        for _ in range(3):
            loss = (model(torch.ones(2, 256)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, trained))
    (losses, ours), (expected, theirs) = results
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[2] < losses[0]
    assert ours.keys() == theirs.keys()
    assert len(ours) == (6 if use_dora else 4)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_nothing_of_it_is_ever_trained() -> None:
    model = Model()
    quantise(model, "int8-quanto")
    assert not any("stored" in name for name, _ in model.named_parameters())
    assert not model.proj_in.bias.requires_grad  # type: ignore[union-attr]


def test_installed_quantising_libraries_say_nothing() -> None:
    script = (
        "from simpletuner.networks.libraries import import_model_libraries, require_quietly as r; import_model_libraries();"
        "[r(m, option='', extra='') for m in ('torchao.quantization', 'bitsandbytes')];"
        "from diffusers import SanaTransformer2DModel; import logging; logging.getLogger('torchao').warning('other words')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "other words"
