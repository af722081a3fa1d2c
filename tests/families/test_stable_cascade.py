"""Stable Cascade's Stage C against the stock pipelines: prompts, latents, times, pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline
from diffusers.models import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from simpletuner.config.rules import judge
from simpletuner.config.run import Dtypes
from simpletuner.data.geometry import fit
from simpletuner.data.samples import Place, Prompt
from simpletuner.errors import UserError
from simpletuner.evaluation.files import png_of
from simpletuner.evaluation.names import facts, is_painted
from simpletuner.events import Notice
from simpletuner.families.base import Shot
from simpletuner.families.stable_cascade import StableCascade
from simpletuner.preflight import shots_of

BF16 = Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16")
AUTOCAST = Dtypes(base="float32", trained="float32", autocast="bfloat16", text="bfloat16", latents="float16")
SHOT = Shot("n", 0, "a cat", "blurry", width_px=384, height_px=256, seed=5, guidance=4.0, steps=3)
STEPS = {"stable_cascade_validation_prior_num_inference_steps": 4}


@pytest.fixture(scope="module")
def folder(tiny_repo):
    return tiny_repo("stable_cascade")


@pytest.fixture(scope="module")
def stock(folder) -> StableCascadePriorPipeline:
    pipeline = StableCascadePriorPipeline.from_pretrained(folder / "stable-cascade-prior")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def stock_decoder(folder) -> StableCascadeDecoderPipeline:
    """From its parts: `from_pretrained` of the whole fails, with `vqgan=` handed to it too (diffusers 0.42.1)."""
    root = folder / "stable-cascade"
    pipeline = StableCascadeDecoderPipeline(
        decoder=StableCascadeUNet.from_pretrained(root, subfolder="decoder"),
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(root / "text_encoder"),
        scheduler=DDPMWuerstchenScheduler.from_pretrained(root, subfolder="scheduler"),
        vqgan=PaellaVQModel.from_pretrained(root, subfolder="vqgan"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def cascade(make_run) -> StableCascade:
    return StableCascade(make_run("stable_cascade", **STEPS))


@pytest.fixture
def embeds(cascade):
    return encoded(cascade, ["a cat", "blurry"])


def encoded(family, texts):
    [encoder] = family.text_encoders()
    with encoder.lent("cpu") as encode:
        return encode([Prompt(text) for text in texts])


# the grid


@pytest.mark.parametrize(
    ("size_px", "cells"), [(640, 15), (768, 18), (896, 21), (1024, 24), (1152, 27), (1280, 30), (1536, 36)]
)
def test_three_latent_cells_are_128_px(cascade, size_px, cells):
    assert cascade.latent.grid(size_px, 1024) == (24, cells)


@pytest.mark.parametrize(
    ("size_WH", "bucket_WH"),
    [((2000, 1500), (1152, 896)), ((1500, 2000), (896, 1152)), ((900, 900), (1024, 1024)), ((3000, 1100), (1664, 640))],
)
def test_bucket_edges_are_multiples_of_128_px(cascade, size_WH, bucket_WH):
    from simpletuner.config.datasets import ImageDataset

    place = fit(size_WH, ImageDataset(id="a", instance_data_dir="b", crop=False), cascade.latent, "a/b")
    assert isinstance(place, Place)
    assert place.target_WH == bucket_WH


@pytest.mark.parametrize(("width", "height"), [(1152, 896), (384, 640)])
def test_pixels_latents_samples_and_pictures_agree_on_the_size(make_run, width, height):
    """One bucket end to end: the encoder's grid, the sampler's grid, and the decoder's picture."""
    options = {"stable_cascade_decoder_subfolder": "decoder_lite", "validation_num_inference_steps": 1, **STEPS}
    family = StableCascade(make_run("stable_cascade", **options))
    grid = family.latent.grid(width, height)
    with family.image_encoder().lent("cpu") as encode:
        assert encode(torch.zeros(1, 3, height, width), ["a"]).shape == (1, 16, *grid)
    cond, uncond = encoded(family, ["a", "b"])
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        latents = sample(replace(SHOT, width_px=width, height_px=height), cond, uncond, None)
    assert latents.shape == (1, 16, *grid)
    with family.image_decoder("cpu") as decode:
        assert decode(latents, cond, uncond).size == (width, height)


# the picture itself


def told_of_pictures(make_run) -> StableCascade:
    return StableCascade(make_run("stable_cascade", stable_cascade_image_embed_probability=0.1, **STEPS))


def test_a_pictures_embedding_equals_the_stock_pipelines(make_run, stock):
    pictures = [Image.effect_noise((160, 128), 80).convert("RGB"), Image.linear_gradient("L").resize((160, 128)).convert("RGB")]
    pixels = torch.stack([torch.tensor(list(one.tobytes())).reshape(128, 160, 3).permute(2, 0, 1) for one in pictures])
    encoder, share = told_of_pictures(make_run).image_prompts()
    assert share == 0.1
    with encoder.lent("cpu") as encode:
        found = torch.cat([encode(one[None].float() / 127.5 - 1, ["a"]) for one in pixels])
    expected, _ = stock.encode_image(pictures, device="cpu", dtype=torch.float32, batch_size=1, num_images_per_prompt=1)
    assert torch.equal(found, expected[0])


def test_a_sample_with_its_pictures_embedding_is_heard_and_the_others_hear_zeros(make_run, embeds):
    family = told_of_pictures(make_run)
    picture = torch.ones(family.denoiser_config["clip_image_in_channels"])
    cond = family.collate([{**embeds[0], "image_D": picture}, embeds[0]], [])
    assert cond["image_B1D"].shape == (2, 1, len(picture))
    assert [row.unique().tolist() for row in cond["image_B1D"]] == [[1.0], [0.0]]
    noisy = torch.randn(1, 16, 6, 6).expand(2, -1, -1, -1)
    with torch.no_grad():
        told, not_told = family.predict(family.load_denoiser(), noisy, torch.tensor([0.5, 0.5]), cond)
    assert not torch.allclose(told, not_told)


def test_no_picture_is_shown_unless_asked_for(cascade):
    assert cascade.image_prompts() is None


def test_a_repository_without_an_image_encoder_is_told_at_start(make_run, folder, tmp_path):
    shutil.copytree(folder / "stable-cascade-prior", tmp_path / "prior")
    shutil.rmtree(tmp_path / "prior" / "image_encoder")
    options = {"pretrained_model_name_or_path": str(tmp_path / "prior"), "stable_cascade_image_embed_probability": 0.1}
    with pytest.raises(UserError, match="no component `image_encoder`"):
        StableCascade(make_run("stable_cascade", **options)).verify()
    StableCascade(make_run("stable_cascade", **{**options, "stable_cascade_image_embed_probability": 0.0})).verify()


# prompts


@pytest.mark.parametrize("dtypes", [{}, {"dtypes": BF16}], ids=["fp32", "bf16"])
def test_prompts_equal_the_stock_pipelines_bit_for_bit(make_run, folder, dtypes):
    texts = ["A Photo of a CAT ", "", "two dogs, 犬🐶\n", "word " * 100]
    family = StableCascade(make_run("stable_cascade", **dtypes))
    encoder = CLIPTextModelWithProjection.from_pretrained(
        folder / "stable-cascade-prior" / "text_encoder", dtype=getattr(torch, family.run.dtypes.text)
    )
    pipeline = StableCascadePriorPipeline.from_pretrained(folder / "stable-cascade-prior", text_encoder=encoder, prior=None)
    with torch.no_grad():
        text, pooled, _, _ = pipeline.encode_prompt("cpu", 4, 1, False, prompt=texts)
    ours = family.collate(encoded(family, texts), [])
    assert ours["text_BLD"].dtype == text.dtype
    assert torch.equal(ours["text_BLD"], text)
    assert torch.equal(ours["pooled_B1D"], pooled)
    assert torch.equal(ours["image_B1D"], torch.zeros(4, 1, 24, dtype=text.dtype))


def test_the_text_is_the_last_layers_output_before_the_final_norm(cascade, embeds):
    [encoder] = cascade.text_encoders()
    model, heard = encoder.load("cpu"), []
    model.text_model.final_layer_norm.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    [embed] = encoder.encode(model, [Prompt("a cat")], "cpu")
    assert torch.equal(embed["text_LD"], heard[0][0])
    assert torch.equal(embed["text_LD"], embeds[0]["text_LD"])


def test_the_mask_matters_to_the_padding_that_the_prior_reads(cascade, embeds):
    [encoder] = cascade.text_encoders()
    tokens = encoder.tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        unmasked = encoder.load("cpu")(tokens.input_ids, output_hidden_states=True).hidden_states[-1][0]
    assert torch.allclose(unmasked[:4], embeds[0]["text_LD"][:4], atol=1e-5)
    assert not torch.allclose(unmasked[10:], embeds[0]["text_LD"][10:], atol=1e-3)


# latents


def test_latents_are_the_normalised_picture_at_three_quarters_through_the_encoder(cascade, folder):
    from simpletuner.networks.effnet import MINIATURE, EfficientNetEncoder

    encoder = EfficientNetEncoder(MINIATURE).eval()
    encoder.load_state_dict(load_file(folder / "stable-cascade" / "effnet_encoder.safetensors"))
    colours = torch.rand(2, 3, 256, 384)
    reduced = torch.nn.functional.interpolate(colours, size=(192, 288), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (reduced - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = encoder.mapper(encoder.backbone(normalised))
    with cascade.image_encoder().lent("cpu") as encode, torch.autocast("cpu", torch.bfloat16):
        latents = encode(colours * 2 - 1, ["a", "b"])
    assert latents.shape == (2, 16, 6, 9)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape", "block"])
def test_an_encoder_that_is_not_whole_is_refused(make_run, folder, tmp_path, spoil):
    weights = load_file(folder / "stable-cascade" / "effnet_encoder.safetensors")
    if spoil == "missing":
        del weights["mapper.1.running_var"]
    elif spoil == "unknown":
        weights["classifier.weight"] = torch.zeros(1)
    elif spoil == "shape":
        weights["mapper.0.weight"] = weights["mapper.0.weight"][:8].clone()
    else:  # what a network inferred from shapes would take for a shallower one
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("backbone.4.1.")}
    save_file(weights, tmp_path / "effnet.safetensors")
    family = StableCascade(make_run("stable_cascade", stable_cascade_effnet_encoder=str(tmp_path / "effnet.safetensors")))
    for step in (family.verify, family.image_encoder().load):  # hours of prompts may lie between the two
        with pytest.raises(UserError, match=r"is not whole[\s\S]*stable-cascade effnet_encoder\.safetensors"):
            step()


def test_a_previewer_of_another_layout_is_told_at_start(make_run, folder, tmp_path):
    repository = shutil.copytree(folder / "stable-cascade", tmp_path / "decoder")
    weights = load_file(repository / "previewer.safetensors")
    weights["blocks.25.weight"] = weights.pop("blocks.24.weight")
    save_file(weights, repository / "previewer.safetensors")
    options = {"stable_cascade_use_decoder_for_validation": False, "validation_prompt": "a cat"}
    options["stable_cascade_decoder_model_name_or_path"] = str(repository)
    with pytest.raises(UserError, match=r"1 missing \(blocks\.24\.weight\); 1 unknown \(blocks\.25\.weight\)"):
        StableCascade(make_run("stable_cascade", **options)).verify()


def test_the_encoder_is_named_by_its_file_or_its_folder(make_run, folder, tmp_path):
    for path in (folder / "stable-cascade", folder / "stable-cascade" / "effnet_encoder.safetensors"):
        family = StableCascade(make_run("stable_cascade", stable_cascade_effnet_encoder=str(path)))
        assert family.image_encoder().file == folder / "stable-cascade" / "effnet_encoder.safetensors"
    with pytest.raises(UserError, match=r"holds no `effnet_encoder\.safetensors`"):
        StableCascade(make_run("stable_cascade", stable_cascade_effnet_encoder=str(tmp_path))).verify()


def test_a_missing_encoder_is_told_with_where_to_get_it(make_run, folder, tmp_path):
    shutil.copytree(folder / "stable-cascade", tmp_path / "decoder")
    (tmp_path / "decoder" / "effnet_encoder.safetensors").unlink()
    run = make_run("stable_cascade", stable_cascade_decoder_model_name_or_path=str(tmp_path / "decoder"))
    with pytest.raises(UserError, match=r"hf download stabilityai/stable-cascade effnet_encoder\.safetensors"):
        StableCascade(run).verify()


@pytest.mark.parametrize("name", ["effnet_encoder.safetensors", "previewer.safetensors"])
def test_a_torn_file_of_the_release_is_told_at_start(make_run, folder, tmp_path, name):
    torn = shutil.copytree(folder / "stable-cascade", tmp_path / "decoder") / name
    torn.write_bytes(torn.read_bytes()[:-7])
    options = {"stable_cascade_decoder_model_name_or_path": str(torn.parent), "validation_prompt": "a cat"}
    with pytest.raises(UserError, match=rf"{name}` is not a whole safetensors file"):
        StableCascade(make_run("stable_cascade", stable_cascade_use_decoder_for_validation=False, **options)).verify()


def test_the_encoder_may_lie_beside_the_prior(make_run, folder, tmp_path):
    prior, decoder = tmp_path / "prior", tmp_path / "decoder"
    shutil.copytree(folder / "stable-cascade-prior", prior)
    shutil.copytree(folder / "stable-cascade", decoder)
    (decoder / "effnet_encoder.safetensors").rename(prior / "effnet_encoder.safetensors")
    run = make_run(
        "stable_cascade", pretrained_model_name_or_path=str(prior), stable_cascade_decoder_model_name_or_path=str(decoder)
    )
    assert StableCascade(run).image_encoder().file == prior / "effnet_encoder.safetensors"


# training


class Listener(torch.nn.Module):
    """A denoiser that keeps what it is told."""

    def forward(self, **heard):
        self.heard = heard
        return (heard["sample"],)


def test_the_denoiser_hears_an_unrounded_float32_ratio_and_everything_it_needs(make_run, embeds):
    family, denoiser = StableCascade(make_run("stable_cascade", dtypes=BF16)), Listener()
    t = torch.tensor([0.123456789], dtype=torch.float64)
    family.predict(denoiser, torch.zeros(1, 16, 3, 3), t, family.collate(embeds[:1], []))
    assert denoiser.heard["timestep_ratio"].dtype == torch.float32
    assert denoiser.heard["timestep_ratio"].item() == pytest.approx(0.123456789, abs=1e-7)
    shapes = {name: tuple(value.shape) for name, value in denoiser.heard.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "sample": (1, 16, 3, 3), "timestep_ratio": (1,), "clip_text_pooled": (1, 1, 32), "clip_text": (1, 77, 32),
        "clip_img": (1, 1, 24),
    }  # fmt: skip
    assert {denoiser.heard[name].dtype for name in shapes if name != "timestep_ratio"} == {torch.bfloat16}


def test_bf16_weights_answer_nearly_as_float32_ones_since_the_embedding_is_exact(make_run, embeds):
    answers = []
    x, t = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.777])
    for dtypes in ({}, {"dtypes": BF16}):
        family = StableCascade(make_run("stable_cascade", **dtypes))
        with torch.no_grad():
            answers.append(family.predict(family.load_denoiser(), x, t, family.collate(embeds[:1], [])).float())
    exact, rounded = answers
    with torch.no_grad():
        denoiser = family.load_denoiser()
        cond = family.collate(embeds[:1], [])
        family.process = SimpleNamespace(ratio=lambda t_B: t_B.bfloat16().float())
        phase_off = family.predict(denoiser, x, t, cond).float()
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    assert (phase_off - exact).norm() > 3 * (rounded - exact).norm(), "a rounded ratio would be heard"


@pytest.mark.parametrize(("weighting", "expected"), [("p2", 1 - 0.5), ("none", 1.0)])
def test_the_loss_weight_is_the_one_asked_for(make_run, weighting, expected):
    family = StableCascade(make_run("stable_cascade", stable_cascade_loss_weighting=weighting))
    half = torch.tensor([0.4973])  # where abar is one half
    assert family.weight(half).item() == pytest.approx(expected, abs=2e-3)
    assert family.adaptive_weights("cpu") is None


def test_adaptive_weights_are_made_where_asked_for_and_p2_then_rests(make_run):
    family = StableCascade(make_run("stable_cascade", stable_cascade_loss_weighting="adaptive"))
    assert family.adaptive_weights("cpu") is not None
    assert family.weight(torch.tensor([0.2])).item() == 1


@pytest.mark.parametrize(("flavour", "blocks"), [(None, 18), ("stage-c", 18), ("stage-c-lite", 12)])
def test_a_flavour_is_a_subfolder_of_one_repository(make_run, folder, flavour, blocks):
    family = StableCascade(make_run("stable_cascade", model_flavour=flavour))
    denoiser = family.load_denoiser()
    assert len(family.blocks(denoiser)) == blocks
    name = "prior_lite" if flavour == "stage-c-lite" else "prior"
    held = load_file(folder / "stable-cascade-prior" / name / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, held[key]) for key, weight in denoiser.state_dict().items())


@pytest.mark.parametrize(("interval", "recomputed"), [(1, 18), (2, 9), (3, 6), (40, 1)])
def test_checkpointing_follows_the_options_over_blocks_in_running_order(make_run, embeds, interval, recomputed):
    family = StableCascade(make_run("stable_cascade", gradient_checkpointing_interval=interval))
    denoiser, order = family.load_denoiser(), []
    for number, block in enumerate(family.blocks(denoiser)):
        block.register_forward_pre_hook(lambda *_, number=number: order.append(number))
    x = torch.randn(1, 16, 3, 3, requires_grad=True)
    family.predict(denoiser, x, torch.tensor([0.4]), family.collate(embeds[:1], [])).sum().backward()
    assert order[:18] == list(range(18))
    assert sorted(order[18:]) == list(range(0, 18, interval))
    assert len(order) == 18 + recomputed


@pytest.mark.parametrize("flavour", ["stage-c", "stage-c-lite"])
def test_the_full_preset_is_every_linear_layer_and_1x1_convolution(make_run, flavour):
    family = StableCascade(make_run("stable_cascade", model_flavour=flavour))
    full, layers = family.adapter_presets["full"], family.load_denoiser().named_modules()
    for name, layer in layers:
        is_flat = isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1)
        if name and (isinstance(layer, torch.nn.Linear) or is_flat):
            assert any(name == end or name.endswith(f".{end}") for end in full), name


def test_the_networks_own_dropout_acts_in_full_tuning_only(make_run):
    from simpletuner.training.tuning import build_tuning

    for model_type, is_active in (("full", True), ("lora", False)):
        family = StableCascade(make_run("stable_cascade", model_type=model_type))
        denoiser = family.load_denoiser()
        build_tuning(family, denoiser, family.run)
        own = [
            module for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Dropout) and "lora" not in name
        ]
        assert own
        assert {module.training for module in own if module.p > 0} == {is_active}


# the gallery


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_shot_is_the_stock_pipelines(cascade, stock, embeds, guidance):
    shot = replace(SHOT, guidance=guidance)
    expected = stock(
        "a cat", negative_prompt="blurry", width=384, height=256, num_inference_steps=4, guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(5),
    ).image_embeddings  # fmt: skip
    with cascade.sampler(cascade.load_denoiser(), "cpu") as sample:
        latents = sample(shot, *embeds, None)
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_picture_is_the_stock_decoders(make_run, stock_decoder, embeds, guidance):
    options = {"stable_cascade_validation_decoder_guidance_scale": guidance, "validation_num_inference_steps": 3, "seed": 5}
    family = StableCascade(make_run("stable_cascade", **options))
    latents = torch.randn(1, 16, 6, 9)
    [expected] = stock_decoder(
        latents, prompt="a cat", negative_prompt="blurry", guidance_scale=guidance, num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images  # fmt: skip
    with family.image_decoder("cpu") as decode:
        picture = decode(latents, *embeds)
    assert picture.size == (384, 256)
    assert difference(picture, expected) <= 1


def difference(first: Image.Image, second: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(first, second).getextrema())


def test_decoder_guidance_up_to_one_is_none(make_run, embeds):
    painted = []
    for guidance in (0.0, 0.5, 1.0):
        family = StableCascade(make_run("stable_cascade", stable_cascade_validation_decoder_guidance_scale=guidance))
        with family.image_decoder("cpu") as decode:
            painted.append(decode(torch.ones(1, 16, 3, 3), *embeds).tobytes())
    assert len(set(painted)) == 1


@pytest.mark.parametrize("dtypes", [{"dtypes": BF16}, {"dtypes": AUTOCAST}], ids=["bf16", "autocast"])
def test_the_gallerys_ratio_is_exact_whatever_the_weights(make_run, embeds, dtypes):
    family = StableCascade(make_run("stable_cascade", **dtypes, **STEPS))
    denoiser, heard = family.load_denoiser(), []
    denoiser.register_forward_pre_hook(lambda _, args, told: heard.append(told), with_kwargs=True)
    with family.sampler(denoiser, "cpu") as sample:
        latents = sample(SHOT, *embeds, None)
    assert latents.dtype == torch.float32
    assert [told["timestep_ratio"].dtype for told in heard] == [torch.float32] * 4
    assert [told["timestep_ratio"][0].item() for told in heard] == [1.0, 0.75, 0.5, 0.25]


def test_a_half_precision_decoder_hears_the_exact_ratio_too(make_run, embeds):
    painted = []
    for dtype in ("fp32", "bf16"):
        family = StableCascade(make_run("stable_cascade", stable_cascade_decoder_dtype=dtype))
        with family.image_decoder("cpu") as decode:
            painted.append(decode(torch.ones(1, 16, 3, 3), *embeds))
    apart = ImageChops.difference(*painted)
    assert 0 < max(ImageStat.Stat(apart).mean) < 5


def test_each_step_is_told_with_its_latents(cascade, embeds):
    told = []
    with cascade.sampler(cascade.load_denoiser(), "cpu") as sample:
        latents = sample(SHOT, *embeds, lambda done, latents: told.append((done, latents)))
    assert [done for done, _ in told] == [1, 2, 3, 4]
    assert torch.equal(told[-1][1], latents)


def test_without_the_decoder_the_previewer_paints_at_the_pictures_size(make_run, folder, embeds):
    from simpletuner.networks.previewer import Previewer

    family = StableCascade(make_run("stable_cascade", stable_cascade_use_decoder_for_validation=False))
    latents = torch.randn(1, 16, 6, 9)
    previewer = Previewer(8).eval()
    previewer.load_state_dict(load_file(folder / "stable-cascade" / "previewer.safetensors"))
    with torch.no_grad():
        pixels = previewer(latents)[0].clamp(0, 1).movedim(0, -1).mul(255).round().to(torch.uint8).numpy()
    with family.image_decoder("cpu") as decode:
        picture = decode(latents, *embeds)
    assert picture.size == (384, 256)
    assert difference(picture, Image.fromarray(pixels).resize((384, 256), Image.Resampling.BICUBIC)) <= 1


@pytest.mark.parametrize("part", ["decoder", "vqgan", "scheduler", "decoder/config.json", "vqgan/config.json"])
def test_a_decoder_that_lacks_a_part_is_told_at_start(make_run, folder, tmp_path, part):
    shutil.copytree(folder / "stable-cascade", tmp_path / "decoder")
    lost = tmp_path / "decoder" / part
    lost.unlink() if lost.is_file() else shutil.rmtree(lost)
    options = {"stable_cascade_decoder_model_name_or_path": str(tmp_path / "decoder")}
    StableCascade(make_run("stable_cascade", **options)).verify()  # no gallery, no need
    with pytest.raises(UserError, match="The gallery's decoder is not here") as told:
        StableCascade(make_run("stable_cascade", validation_prompt="a cat", **options)).verify()
    assert "stable_cascade_use_decoder_for_validation" in str(told.value)
    options["stable_cascade_use_decoder_for_validation"] = False
    StableCascade(make_run("stable_cascade", validation_prompt="a cat", **options)).verify()
    (tmp_path / "decoder" / "previewer.safetensors").unlink()
    with pytest.raises(UserError, match=r"previewer\.safetensors"):
        StableCascade(make_run("stable_cascade", validation_prompt="a cat", **options)).verify()


def test_a_missing_scheduler_of_the_prior_is_told_at_start_where_there_is_a_gallery(make_run, folder, tmp_path):
    prior = shutil.copytree(folder / "stable-cascade-prior", tmp_path / "prior")
    shutil.rmtree(prior / "scheduler")
    options = {"pretrained_model_name_or_path": str(prior)}
    StableCascade(make_run("stable_cascade", **options)).verify()
    with pytest.raises(UserError, match="scheduler_config"):
        StableCascade(make_run("stable_cascade", validation_prompt="a cat", **options)).verify()


@pytest.mark.parametrize("kind", ["decoder", "decoder_lite", "own"])
def test_the_decoder_may_be_lite_or_a_folder_of_ones_own(make_run, folder, tmp_path, kind):
    widths = {"decoder": 8, "decoder_lite": 4, "own": 4}
    subfolder = kind
    if kind == "own":
        subfolder = str(shutil.copytree(folder / "stable-cascade" / "decoder_lite", tmp_path / "mine"))
    family = StableCascade(make_run("stable_cascade", stable_cascade_decoder_subfolder=subfolder))
    family.decoder.verify()
    assert StableCascadeUNet.load_config(family.decoder.folder)["block_out_channels"][0] == widths[kind]


def test_the_priors_own_guidance_wins_over_the_galleries(make_run):
    told = []
    common = {
        "validation_prompt": "a cat",
        "validation_guidance": 4.5,
        "validation_seed": 1,
        "validation_num_inference_steps": 30,
    }
    for own, expected in ((None, 4.5), (3.5, 3.5), (0.0, 0.0)):
        run = make_run("stable_cascade", stable_cascade_validation_prior_guidance_scale=own, **common)
        [shot] = shots_of(run, StableCascade(run), told.append)
        assert (shot.guidance, shot.steps) == (expected, 30)


@pytest.mark.parametrize(
    "option",
    [
        {"stable_cascade_validation_prior_num_inference_steps": 5},
        {"stable_cascade_validation_decoder_guidance_scale": 2.0},
        {"stable_cascade_decoder_subfolder": "decoder_lite"},
        {"stable_cascade_decoder_dtype": "bf16"},
        {"stable_cascade_use_decoder_for_validation": False},
    ],
)
def test_a_picture_made_otherwise_is_not_taken_for_the_galleries_own(make_run, tmp_path, option):
    plain = {"validation_prompt": "a cat", "validation_seed": 1}
    families = [StableCascade(make_run("stable_cascade", **plain, **each)) for each in ({}, option)]
    shots = [shot for family in families for shot in shots_of(family.run, family, lambda _: None)]
    for number, shot in enumerate(shots):
        png = png_of(Image.new("RGB", (8, 8)), facts(shot, step=0, weights="base"))
        (tmp_path / f"{number}.png").write_bytes(png)
    found = [[is_painted(tmp_path / f"{number}.png", shot, 0, "base") for shot in shots] for number in range(2)]
    assert found == [[True, False], [False, True]]


def test_the_libraries_say_nothing_of_what_no_user_can_change(cascade, embeds, caplog, capfd):
    with cascade.sampler(cascade.load_denoiser(), "cpu") as sample:
        sample(SHOT, *embeds, None)
    assert "deprecated" not in caplog.text + "".join(capfd.readouterr())


# what is refused


def problems(run):
    return list(StableCascade.check(run))


def test_reduced_precision_is_refused_in_the_pages_words_and_overridable(make_run):
    assert problems(make_run("stable_cascade")) == []
    for precision in ("bf16", "fp16"):
        run = make_run("stable_cascade", mixed_precision=precision)
        [problem] = problems(run)
        assert problem.what.startswith("Stable Cascade Stage C requires --mixed_precision=no")
        refused, _ = judge(run, [problem])
        assert refused == [problem]
        waived = make_run("stable_cascade", mixed_precision=precision, i_know_what_i_am_doing=True)
        refused, [warning] = judge(waived, [problem])
        assert not refused
        assert "Going on" in warning


def test_a_quantised_base_in_float16_is_no_way_round_the_guard(make_run):
    for base, expected in (("float32", []), ("bfloat16", []), ("float16", ["base_model_default_dtype"])):
        run = make_run("stable_cascade", base_model_precision="int8-torchao", dtypes=replace(BF16, base=base))
        assert [problem.option for problem in problems(run)] == expected


def test_options_of_flow_matching_are_refused_where_they_were_written(make_run):
    flow = ["flow_schedule_shift", "validation_flow_shift"]
    sources = {**dict.fromkeys(flow, "file config.json"), "flow_sigmoid_scale": "core"}
    run = replace(make_run("stable_cascade"), sources=sources)
    assert [problem.option for problem in problems(run)] == flow


def test_prompts_have_77_tokens_whatever_is_asked_for_and_that_is_told(make_run):
    assert not list(StableCascade.notices(make_run("stable_cascade", tokenizer_max_length=77)))
    run = make_run("stable_cascade", tokenizer_max_length=154)
    [notice] = StableCascade.notices(run)
    assert "`tokenizer_max_length` 154 is overridden" in notice
    assert encoded(StableCascade(run), ["a cat"])[0]["text_LD"].shape[0] == 77


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"validation_guidance": 4.0, "stable_cascade_validation_prior_guidance_scale": 3.5}, "`validation_guidance` 4 is not"),
        ({"stable_cascade_validation_decoder_guidance_scale": 0.5}, "0.5 makes the same pictures as 0"),
        (
            {"validation_num_inference_steps": 30, "stable_cascade_use_decoder_for_validation": False},
            "`validation_num_inference_steps` is Stage B's",
        ),
    ],
)
def test_what_alters_no_picture_is_said_to(make_run, options, told):
    [notice] = StableCascade.notices(make_run("stable_cascade", validation_prompt="a cat", **options))
    assert told in notice
    assert not list(StableCascade.notices(make_run("stable_cascade", **options))), "without a gallery there is nothing to say"
    obeyed = {"validation_guidance": 4.0, "validation_num_inference_steps": 30}
    obeyed["stable_cascade_validation_decoder_guidance_scale"] = 1.1
    assert not list(StableCascade.notices(make_run("stable_cascade", validation_prompt="a cat", **obeyed)))


def test_tiles_are_said_to_have_no_effect(make_run):
    assert not list(StableCascade.notices(make_run("stable_cascade", vae_enable_slicing=True)))
    [notice] = StableCascade.notices(make_run("stable_cascade", vae_enable_tiling=True))
    assert "`vae_enable_tiling` has no effect" in notice


def test_a_quantised_base_keeps_only_small_layers_whole(cascade):
    denoiser = cascade.load_denoiser()
    linear = {name: module.weight.numel() for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    whole = {name for name in linear if any(fnmatch(name, pattern) for pattern in cascade.kept_whole)}
    assert {name.rpartition(".")[2] for name in whole} == {
        "mapper", "mapper_sca", "mapper_crp", "clip_txt_pooled_mapper", "clip_txt_mapper", "clip_img_mapper",
    }  # fmt: skip
    blocks = {name for name in linear if "attention" in name or "channelwise" in name or "kv_mapper" in name}
    assert blocks == linear.keys() - whole


def test_buckets_beyond_two_to_one_are_warned_of(cascade, tmp_path):
    from simpletuner.config.datasets import ImageDataset
    from simpletuner.data.ranks import Alone
    from simpletuner.preflight import open_sets

    for name, size in (("long", (900, 300)), ("square", (300, 300))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    entry = ImageDataset(id="pets", instance_data_dir=str(tmp_path), resolution=512, cache_dir_vae=str(tmp_path.parent / "vae"))
    told: list[Notice] = []
    open_sets(replace(cascade.run, datasets=(entry,)), cascade.latent, Alone(), told.append)
    [warning] = [event.text for event in told if getattr(event, "level", "") == "warning"]
    assert "beyond 2:1" in warning
    assert "896x256" in warning
    assert "512x512" not in warning
