"""What every family keeps over a base of few bits, in each format.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.catalogue import PRECISIONS
from simpletuner.config.run import Dtypes
from simpletuner.config.sections import SECTIONS
from simpletuner.data.samples import Cond, Embeds, Place, Prompt
from simpletuner.diffusion.objective import l2
from simpletuner.families import find
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.networks.quantise import QuantisedConv2d, QuantisedLinear, quantise, stored_bytes
from simpletuner.training.tuning import build_tuning

FLOAT32 = Dtypes(base="float32", trained="float32", autocast=None, text="float32", latents="float32")
BF16 = replace(FLOAT32, base="bfloat16", text="bfloat16")
PROMPTS = [Prompt("a red cat"), Prompt("two dogs", "uncond")]
FARTHEST = {8: 0.02, 4: 0.2, 2: 0.8}
"""Relative distance of an answer from the whole base's, by bits. Random weights, so no bit of theirs is redundant."""
FARTHEST_FP8 = 0.06
ENCODERS = [key for key in SECTIONS["precision"].model_fields if key.startswith("text_encoder_")]

pytestmark = pytest.mark.parametrize("name", find())
over_formats = pytest.mark.parametrize("precision", PRECISIONS)


def farthest(precision: str) -> float:
    return FARTHEST_FP8 if precision.startswith("fp8") else FARTHEST[int(PRECISIONS[precision].bits)]


def encode(family: ModelFamily) -> list[Embeds]:
    merged: list[Embeds] = [{} for _ in PROMPTS]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode_prompts:
            for embeds, more in zip(merged, encode_prompts(PROMPTS), strict=True):
                embeds.update(more)
    return merged


def batch(family: ModelFamily) -> tuple[Tensor, Tensor, Cond]:
    edge = family.latent.native_edge_px
    place = Place((edge, edge), (edge, edge), (0, 0), (edge, edge))
    rows, columns = family.latent.grid(edge, edge)
    x_BCHW = torch.randn(2, family.latent.channels, rows, columns, generator=torch.Generator().manual_seed(0))
    return x_BCHW, torch.tensor([0.3, 0.8]), family.collate(encode(family), [place, place])


def quantised_base(family: ModelFamily, precision: str) -> nn.Module:
    denoiser = family.load_denoiser()
    quantise(denoiser, precision, keep=family.kept_whole)
    return denoiser


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@over_formats
@pytest.mark.parametrize("dtypes", [FLOAT32, BF16], ids=["fp32", "bf16"])
def test_it_answers_nearly_as_the_whole_base(name: str, make_run: Any, precision: str, dtypes: Dtypes) -> None:
    family = find()[name](make_run(name, dtypes=dtypes))
    with torch.no_grad():
        whole = family.predict(family.load_denoiser(), *batch(family)).float()
        answer = family.predict(quantised_base(family, precision), *batch(family)).float()
    assert torch.isfinite(answer).all()
    assert 0 < distance(answer, whole) < farthest(precision) + (0.02 if dtypes is BF16 else 0)


@over_formats
def test_the_blocks_shrink_and_what_the_family_names_stays_whole(name: str, make_run: Any, precision: str) -> None:
    family = find()[name](make_run(name))
    whole, denoiser = family.load_denoiser(), quantised_base(family, precision)
    names = {module: key for key, module in whole.named_modules()}
    shares = []  # of float32; SD3's norms have wide layers, which stay whole
    for block, before in zip(family.blocks(denoiser), family.blocks(whole), strict=True):
        layers = [names[module] for module in before.modules() if isinstance(module, nn.Linear)]
        if not all(any(fnmatchcase(key, pattern) for pattern in family.kept_whole) for key in layers):  # as Cascade's of time
            shares.append(stored_bytes(block) / stored_bytes(before))
    assert shares
    assert max(shares) < 0.6
    changed = [key for key, module in denoiser.named_modules() if isinstance(module, (QuantisedLinear, QuantisedConv2d))]
    assert not [key for key in changed if any(fnmatchcase(key, pattern) for pattern in family.kept_whole)]
    assert all(any(fnmatchcase(key, pattern) for key, _ in denoiser.named_modules()) for pattern in family.kept_whole)


@over_formats
def test_gradients_reach_the_adapter_and_nothing_else(name: str, make_run: Any, precision: str) -> None:
    family = find()[name](make_run(name, dtypes=BF16, lora_rank=2, gradient_checkpointing=True))
    denoiser = quantised_base(family, precision)
    tuning = build_tuning(family, denoiser, family.run)
    x_BCHW, t_B, cond = batch(family)
    l2(family.predict(denoiser, x_BCHW, t_B, cond).float(), torch.zeros_like(x_BCHW)).mean().backward()
    trained = {id(parameter) for parameter in tuning.parameters().values()}
    for key, parameter in denoiser.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), key
    assert all(parameter.grad.abs().sum() > 0 for key, parameter in tuning.parameters().items() if "lora_B" in key)


@over_formats
def test_a_step_lowers_the_loss_and_saved_it_answers_the_same_again(
    name: str, make_run: Any, tmp_path: Any, precision: str
) -> None:
    family = find()[name](make_run(name, lora_rank=4, lora_dropout=0.0))
    x_BCHW, t_B, cond = batch(family)
    denoiser = quantised_base(family, precision)
    tuning = build_tuning(family, denoiser, family.run)
    optimizer = torch.optim.Adam(tuning.parameters().values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = l2(family.predict(denoiser, x_BCHW, t_B, cond), torch.zeros_like(x_BCHW)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuning.save(tmp_path)
    again = quantised_base(family, precision)
    tuning_again = build_tuning(family, again, family.run)
    tuning_again.load(tuning_again.read(tmp_path))
    with torch.no_grad(), tuning.evaluating(), tuning_again.evaluating():
        assert torch.equal(family.predict(denoiser, x_BCHW, t_B, cond), family.predict(again, x_BCHW, t_B, cond))
        with tuning.disabled():
            base = family.predict(quantised_base(family, precision), x_BCHW, t_B, cond)
            assert torch.equal(family.predict(denoiser, x_BCHW, t_B, cond), base)


@over_formats
def test_the_gallery_samples_from_it(name: str, make_run: Any, precision: str) -> None:
    family = find()[name](make_run(name, dtypes=BF16, lora_rank=2))
    denoiser = quantised_base(family, precision)
    build_tuning(family, denoiser, family.run)
    edge = family.latent.native_edge_px
    shot = Shot("main", 0, "a cat", "", edge, edge, seed=3, guidance=family.shot_defaults()[0], steps=2)
    with family.sampler(denoiser, "cpu") as sample:
        latents = sample(shot, *encode(family), None)
    assert torch.isfinite(latents).all()


@over_formats
def test_its_text_encoders_can_be_stored_so_and_their_embeds_are_others(name: str, make_run: Any, precision: str) -> None:
    whole = find()[name](make_run(name))
    for place, option in enumerate(ENCODERS[: len(whole.text_encoders())]):
        family = find()[name](make_run(name, **{option: precision}))
        encoder, former = family.text_encoders()[place], whole.text_encoders()[place]
        assert encoder.recipe.facts.items() - former.recipe.facts.items() == {("precision", precision)}
        assert encoder.recipe.digest != former.recipe.digest
        with encoder.lent("cpu") as of_bits, former.lent("cpu") as of_whole:
            for ours, theirs in zip(of_bits(PROMPTS), of_whole(PROMPTS), strict=True):
                for key in theirs:
                    assert ours[key].dtype == theirs[key].dtype
                    assert 0 < distance(ours[key], theirs[key]) < 2 * farthest(precision)


def test_whole_text_encoders_have_the_recipes_that_they_had_before_there_was_a_choice(name: str, make_run: Any) -> None:
    for encoder in find()[name](make_run(name)).text_encoders():
        assert "precision" not in encoder.recipe.facts
