"""Every kind of adapter in every family: it trains, it is loaded elsewhere, and the base is unhurt.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.run import Dtypes, Run
from simpletuner.data.samples import Place, Prompt
from simpletuner.examples.tiny import model_options
from simpletuner.families import find
from simpletuner.families.base import ModelFamily
from simpletuner.families.stable_cascade import load_stage_c_lora
from simpletuner.training.tuning import Tuning, build_tuning

BF16 = Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16")
LYCORIS: dict[str, dict[str, Any]] = {
    "lokr": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 8},
    "lokr-low-rank": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4, "apply_preset": "full"},
    "lokr-dora": {"algo": "lokr", "linear_dim": 2, "factor": 4, "dora_wd": True, "apply_preset": "attn-mlp"},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2, "apply_preset": "attn-mlp"},
    "loha-tucker": {"algo": "loha", "linear_dim": 4, "use_tucker": True, "apply_preset": "attn-mlp"},
    "locon": {"algo": "locon", "multiplier": 0.5, "linear_dim": 4, "conv_dim": 2, "apply_preset": "full"},
    "full": {"algo": "full"},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 2},
    "dora": {"lora_rank": 2, "use_dora": True},
    **{kind: {"lora_type": "lycoris", "lycoris_config": config} for kind, config in LYCORIS.items()},
}


@dataclass
class Tuned:
    """A denoiser with its adapter, and what it is asked."""

    family: ModelFamily
    denoiser: Any
    tuning: Tuning
    question: tuple[Any, ...]

    def answer(self, denoiser: nn.Module | None = None) -> Tensor:
        return self.family.predict(denoiser or self.denoiser, *self.question)

    def settled(self) -> Tensor:
        with self.tuning.evaluating(), torch.no_grad():
            return self.answer()

    def deaf(self) -> list[str]:
        """Weights of the adapter that get no gradient, on layers that can alter the answer.

        Some of a base cannot: SD3's last block asks questions of the text whose answers it drops.
        """
        base = self.family.load_denoiser().requires_grad_(True)
        self.answer(base).square().mean().backward()
        layers = {name.rpartition(".")[0]: weight.grad for name, weight in base.named_parameters() if name.endswith(".weight")}
        mute = [name.replace(".", "_") + "_" for name, grad in layers.items() if grad is None or not grad.any()]
        names = {key: key.replace(".", "_") for key, weight in self.tuning.parameters().items() if not weight.grad.any()}
        return [key for key, name in names.items() if not any(f"_{each}" in f"_{name}" for each in mute)]

    def stir(self, seed: int = 0, strength: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.tuning.parameters().values():
            parameter.data += strength * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def question_of(family: ModelFamily) -> tuple[Any, ...]:
    """Two noisy latents of the native size, their times and conditions."""
    embeds: list[dict[str, Tensor]] = [{}, {}]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            for merged, more in zip(embeds, encode([Prompt("a red cat"), Prompt("", "uncond")]), strict=True):
                merged.update(more)
    edge = family.latent.native_edge_px
    shape = (2, family.latent.channels, *family.latent.grid(edge, edge))
    x_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (
        x_BCHW,
        torch.tensor([0.3, 0.8]),
        family.collate(embeds, [Place((edge, edge), (edge, edge), (0, 0), (edge, edge))] * 2),
    )


Build = Callable[..., Tuned]


@pytest.fixture(scope="module")
def questions() -> dict[str, tuple[Any, ...]]:
    """Encoding takes longer than all else here."""
    return {}


@pytest.fixture
def build(make_run: Callable[..., Run], questions: dict[str, tuple[Any, ...]]) -> Build:
    def built(name: str, kind: str, *, dtypes: Dtypes | None = None, prepare: Any = None, **options: Any) -> Tuned:
        run = make_run(name, **KINDS[kind], **options)
        family = find()[name](replace(run, dtypes=dtypes or run.dtypes))
        if name not in questions:
            questions[name] = question_of(family)
        denoiser = family.load_denoiser()
        if prepare is not None:
            prepare(family, denoiser)
        return Tuned(family, denoiser, build_tuning(family, denoiser, family.run), questions[name])

    return built


def base_answer(tuned: Tuned) -> Tensor:
    with torch.no_grad():
        return tuned.answer(tuned.family.load_denoiser().requires_grad_(False))


def stock(name: str, tiny_repo: Callable[[str], Path]) -> tuple[Any, Any]:
    """The stock pipeline, and its denoiser."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(model_options(name, tiny_repo(name))["pretrained_model_name_or_path"])
    return pipeline, denoiser_of(pipeline)


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.prior if "prior" in pipeline.components else pipeline.transformer


def load_lora(pipeline: Any, file: Path) -> None:
    """As the stock pipeline does; Stable Cascade's cannot, and ours does it there."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(file)
    else:
        load_stage_c_lora(pipeline, file)


each_family = pytest.mark.parametrize("name", find())
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_family
@each_kind
def test_gradients_reach_every_weight_of_the_adapter_and_nothing_else(build: Build, name: str, kind: str) -> None:
    tuned = build(name, kind)
    tuned.stir()
    tuned.answer().square().mean().backward()
    parameters = {id(parameter) for parameter in tuned.tuning.parameters().values()}
    got = {id(parameter) for parameter in tuned.denoiser.parameters() if parameter.grad is not None}
    assert got == parameters
    assert not tuned.deaf()


@each_family
@each_kind
def test_a_few_steps_lower_the_loss(build: Build, name: str, kind: str) -> None:
    tuned = build(name, kind, **({"lora_dropout": 0.0} if "lycoris" not in str(KINDS[kind]) else {}))
    target = base_answer(tuned) * 0.5
    optimizer = torch.optim.AdamW(tuned.tuning.parameters().values(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = (tuned.answer() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each_family
@each_kind
@pytest.mark.parametrize("dtypes", [None, BF16], ids=["fp32", "bf16"])
def test_the_base_answers_bit_for_bit_while_the_adapter_is_off(build: Build, name: str, kind: str, dtypes: Any) -> None:
    tuned = build(name, kind, dtypes=dtypes)
    tuned.stir()
    base = base_answer(tuned)
    with tuned.tuning.disabled(), torch.no_grad():
        assert torch.equal(tuned.answer(), base)
    assert not torch.allclose(tuned.settled(), base, atol=1e-3)
    tuned.answer().square().mean().backward()
    assert all(parameter.grad is not None for parameter in tuned.tuning.parameters().values())


@each_family
@each_kind
def test_a_fresh_adapter_changes_nothing(build: Build, name: str, kind: str) -> None:
    tuned = build(name, kind)
    tolerance = 1e-5 if "dora" in kind else 0.0  # the weight is taken apart and put together again
    torch.testing.assert_close(tuned.settled(), base_answer(tuned), atol=tolerance, rtol=0)


@each_family
@each_kind
@pytest.mark.parametrize("dtypes", [None, BF16], ids=["fp32", "bf16"])
def test_what_is_saved_answers_the_same_when_it_is_read_back(
    build: Build, name: str, kind: str, dtypes: Any, tmp_path: Path
) -> None:
    tuned, other = build(name, kind, dtypes=dtypes), build(name, kind, dtypes=dtypes, seed=5)
    tuned.stir()
    tuned.tuning.save(tmp_path)
    assert not torch.equal(tuned.settled(), other.settled())
    other.tuning.load(other.tuning.read(tmp_path))
    assert torch.equal(tuned.settled(), other.settled())
    weights = tuned.tuning.weights()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in other.tuning.weights().items())


@each_family
@each_kind
def test_an_adapter_over_a_half_precision_base_is_near_the_float32_one(build: Build, name: str, kind: str) -> None:
    whole, half = build(name, kind), build(name, kind, dtypes=BF16)
    for tuned in (whole, half):
        tuned.stir(strength=0.1)
        assert {parameter.dtype for parameter in tuned.tuning.parameters().values()} == {torch.float32}
    moved, moved_in_half = (tuned.settled() - base_answer(tuned) for tuned in (whole, half))
    rounding = (base_answer(half).float() - base_answer(whole)).norm()  # of the base alone; it is there twice
    error = (moved_in_half - moved).norm()
    assert error < 0.05 * moved.norm() + 2 * rounding, (error, moved.norm(), rounding)


@each_family
@each_kind
def test_recomputed_blocks_have_the_same_gradients(build: Build, name: str, kind: str) -> None:
    gradients = []
    for is_recomputed in (True, False):
        tuned = build(name, kind, gradient_checkpointing=is_recomputed)
        tuned.stir()
        torch.manual_seed(3)
        tuned.answer().square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in tuned.tuning.parameters().items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], atol=1e-7, rtol=1e-4, msg=key)


@each_family
@each_kind
def test_the_stock_pipeline_answers_as_ours(
    build: Build, name: str, kind: str, tmp_path: Path, tiny_repo: Callable[[str], Path]
) -> None:
    tuned = build(name, kind)
    tuned.stir()
    file = tuned.tuning.save_result(tmp_path)
    pipeline, denoiser = stock(name, tiny_repo)
    if kind in LYCORIS:
        from lycoris import create_lycoris_from_weights

        multiplier = LYCORIS[kind].get("multiplier", 1.0)
        create_lycoris_from_weights(multiplier, str(file), denoiser)[0].apply_to()
    else:
        load_lora(pipeline, file)
    with torch.no_grad():
        theirs = tuned.answer(denoiser.eval())
    torch.testing.assert_close(tuned.settled(), theirs, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(theirs, base_answer(tuned), atol=1e-3)


@each_family
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_the_closing_words_are_a_program_that_paints(
    build: Build, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = build(name, kind)
    tuned.stir()
    snippet = tuned.family.usage(tuned.tuning.save_result(tmp_path), "a red cat")
    namespace: dict[str, Any] = {}
    brief = re.sub(r"num_inference_steps=\d+, ", "", snippet).replace("guidance_scale", "num_inference_steps=1, guidance_scale")
    exec(brief.replace("=1024", "=128"), namespace)
    assert (tmp_path / "picture.png").is_file()
    with torch.no_grad():
        torch.testing.assert_close(
            tuned.answer(denoiser_of(namespace.get("pipeline") or namespace["prior"])), tuned.settled(), atol=2e-5, rtol=1e-4
        )


@each_family
def test_every_target_preset_trains_other_layers_and_loads_in_the_stock_pipeline(
    build: Build, name: str, tmp_path: Path, tiny_repo: Callable[[str], Path]
) -> None:
    names = set()
    for preset in find()[name].adapter_presets:
        tuned = build(name, "lora", lora_target_preset=preset)
        tuned.stir()
        tuned.answer().square().mean().backward()
        assert not tuned.deaf(), preset
        pipeline, denoiser = stock(name, tiny_repo)
        load_lora(pipeline, tuned.tuning.save_result(tmp_path / preset))
        with torch.no_grad():
            torch.testing.assert_close(tuned.answer(denoiser.eval()), tuned.settled(), atol=2e-5, rtol=1e-4, msg=preset)
        names.add(frozenset(tuned.tuning.parameters()))
    assert len(names) == len(find()[name].adapter_presets)


@each_family
@pytest.mark.parametrize("preset", ["attn-only", "attn-mlp", "full"])
def test_every_class_of_a_lycoris_preset_is_in_the_denoiser(build: Build, name: str, preset: str) -> None:
    tuned = build(name, "lokr")
    classes = {type(module).__name__ for module in tuned.denoiser.modules()}
    assert set(find()[name].lycoris_presets[preset]) <= classes


def by_quanto(family: ModelFamily, denoiser: nn.Module) -> None:
    from optimum.quanto import freeze, qint8, quantize

    for block in family.blocks(denoiser):
        quantize(block, weights=qint8)
        freeze(block)


def by_torchao(family: ModelFamily, denoiser: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for block in family.blocks(denoiser):
        quantize_(block, Int8WeightOnlyConfig())


@each_family
@pytest.mark.parametrize("kind", ["lora", "lokr", "lokr-low-rank", "loha", "locon"])
@pytest.mark.parametrize("quantise", [by_quanto, by_torchao])
def test_adapters_train_and_come_back_over_quantised_bases(
    build: Build, name: str, kind: str, quantise: Any, tmp_path: Path
) -> None:
    options = {"prepare": quantise, "base_model_precision": "int8-quanto", "dtypes": BF16}
    tuned = build(name, kind, **options)
    assert tuned.tuning.parameters().keys() == build(name, kind).tuning.parameters().keys()
    assert not tuned.tuning.notices
    with tuned.tuning.disabled(), torch.no_grad():
        base = tuned.answer()
    tuned.stir()
    tuned.answer().square().mean().backward()
    assert not tuned.deaf()
    assert not torch.allclose(tuned.settled(), base, atol=1e-3)
    with tuned.tuning.disabled(), torch.no_grad():
        assert torch.equal(tuned.answer(), base)
    tuned.tuning.save(tmp_path)
    other = build(name, kind, seed=5, **options)
    other.tuning.load(other.tuning.read(tmp_path))
    assert torch.equal(other.settled(), tuned.settled())
