"""Sana against the stock pipeline: prompts, latents, schedules, files."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from transformers import Gemma2Model

from simpletuner.config.load import parse
from simpletuner.config.run import Dtypes
from simpletuner.data.samples import Prompt
from simpletuner.diffusion.density import auto_shift
from simpletuner.errors import ConfigError, UserError
from simpletuner.families import find
from simpletuner.families.base import Shot
from simpletuner.families.instruction import stock_instruction
from simpletuner.families.sana import Sana

BF16 = Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16")
AUTOCAST = Dtypes(base="float32", trained="float32", autocast="bfloat16", text="float32", latents="float16")
PROMPTS = ["A Photo of a CAT ", "", "two dogs, 犬🐶, in the RAIN\n", "word " * 400]
SHOT = Shot("n", 0, "a cat", "blurry", width_px=128, height_px=96, seed=5, guidance=4.5, steps=4)


@pytest.fixture(scope="module")
def stock(tiny_repo) -> SanaPipeline:
    pipeline = SanaPipeline.from_pretrained(tiny_repo("sana"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sana(make_run) -> Sana:
    return Sana(make_run("sana"))


@pytest.fixture
def embeds(sana):
    return encoded(sana, [Prompt("a cat"), Prompt("blurry", "uncond")])


def encoded(family: Sana, prompts: list[Prompt]) -> list[dict[str, torch.Tensor]]:
    [encoder] = family.text_encoders()
    with encoder.lent("cpu") as encode:
        return encode(prompts)


# what the repository says


def test_the_latent_grid_is_read_from_the_repository(sana):
    assert sana.latent.grid(128, 96) == (3, 4)
    assert (sana.latent.channels, sana.latent.cell_px, sana.latent.native_edge_px, sana.latent.alignment_px) == (
        32,
        32,
        128,
        32,
    )


def test_another_compression_is_read_from_the_autoencoder(make_run, tiny_repo, tmp_path):
    folder = shutil.copytree(tiny_repo("sana"), tmp_path / "f8")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "encoder_block_out_channels": [8, 8, 16, 32]}))
    family = Sana(make_run("sana", pretrained_model_name_or_path=str(folder)))
    assert (family.latent.cell_px, family.latent.native_edge_px, family.latent.alignment_px) == (8, 32, 8)


def test_without_a_path_the_flavours_repository_is_used(make_run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    family = Sana(make_run("sana", pretrained_model_name_or_path=None, model_flavour="sana1.0-1.6b-2048"))
    with pytest.raises(UserError, match="Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers"):
        _ = family.repository


# prompts


@pytest.mark.parametrize("dtypes", [{"dtypes": BF16}, {}], ids=["bf16", "fp32"])
@pytest.mark.parametrize("instruction", [None, "None", ("Improve:", "Prompt: ")])
def test_prompts_equal_the_stock_pipelines_bit_for_bit(make_run, tiny_repo, dtypes, instruction):
    family = Sana(make_run("sana", sana_complex_human_instruction=instruction, **dtypes))
    text_dtype = getattr(torch, family.run.dtypes.text)
    text_encoder = Gemma2Model.from_pretrained(tiny_repo("sana") / "text_encoder", dtype=text_dtype)
    pipeline = SanaPipeline.from_pretrained(tiny_repo("sana"), text_encoder=text_encoder, transformer=None, vae=None)
    chi = {None: stock_instruction(), "None": None}.get(instruction, list(instruction or ()))
    with torch.no_grad():
        cond, cond_mask, uncond, uncond_mask = pipeline.encode_prompt(
            PROMPTS, negative_prompt=PROMPTS, complex_human_instruction=chi
        )
    mixed = [Prompt(text, role) for text in PROMPTS for role in ("cond", "uncond")]
    ours = family.collate(encoded(family, mixed), [])
    for role, hidden, mask in (("cond", cond, cond_mask), ("uncond", uncond, uncond_mask)):
        mine = slice(0 if role == "cond" else 1, None, 2)
        assert ours["mask_BL"].dtype == torch.int64
        assert torch.equal(ours["mask_BL"][mine], mask)
        assert ours["prompt_BLD"].dtype == text_dtype
        assert torch.equal(ours["prompt_BLD"][mine][mask.bool()], hidden[mask.bool()])


def test_embeds_are_as_long_as_the_mask_shows_and_no_longer(sana):
    lengths = [
        len(embed["prompt_LD"])
        for embed in encoded(sana, [Prompt("", "uncond"), Prompt("a cat", "uncond"), Prompt("word " * 400)])
    ]
    assert lengths == [1, 3, 300]


def test_the_denoiser_answers_trimmed_prompts_as_whole_ones(sana, stock):
    with torch.no_grad():
        prompt, mask, _, _ = stock.encode_prompt(["a cat"], complex_human_instruction=stock_instruction())
    denoiser = sana.load_denoiser()
    x, t = torch.randn(1, 32, 4, 4), torch.tensor([0.3])
    trimmed = sana.collate(encoded(sana, [Prompt("a cat")]), [])
    assert not torch.equal(trimmed["prompt_BLD"], prompt)
    with torch.no_grad():
        whole = sana.predict(denoiser, x, t, {"prompt_BLD": prompt, "mask_BL": mask})
        assert torch.equal(sana.predict(denoiser, x, t, trimmed), whole)


@pytest.mark.parametrize(("tokens", "padded"), [([1], 32), ([5, 32], 32), ([33, 2], 64), ([289], 300), ([300, 7], 300)])
def test_a_batch_is_padded_to_its_longest_prompt_in_steps_of_32_tokens(sana, tokens, padded):
    cond = sana.collate([{"prompt_LD": torch.ones(length, 4)} for length in tokens], [])
    assert cond["prompt_BLD"].shape == (len(tokens), padded, 4)
    assert cond["mask_BL"].sum(1).tolist() == tokens
    assert torch.equal(cond["prompt_BLD"], cond["mask_BL"][:, :, None].expand(-1, -1, 4).float())


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [({}, 1e-6), ({"dtypes": AUTOCAST}, 1e-3), ({"dtypes": BF16}, 1e-3)],
    ids=["fp32", "autocast", "bf16"],
)
def test_padding_beyond_the_longest_prompt_alters_no_answer_and_no_gradient(make_run, dtypes, tolerance):
    """Up to the order in which sums are rounded: a bfloat16 holds three digits."""
    family = Sana(make_run("sana", model_type="full", **dtypes))
    denoiser = family.load_denoiser()
    torch.manual_seed(0)
    cond = family.collate([{"prompt_LD": 3 * torch.randn(tokens, 32)} for tokens in (5, 37)], [])
    whole = {name: torch.nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, 236)) for name, part in cond.items()}
    assert (cond["mask_BL"].shape, whole["mask_BL"].shape) == ((2, 64), (2, 300))
    x, t = torch.randn(2, 32, 4, 4), torch.tensor([0.2, 0.7])
    answers, gradients = [], []
    autocast = family.run.dtypes.autocast
    for batch in (cond, whole):
        denoiser.zero_grad()
        with torch.autocast("cpu", getattr(torch, autocast or "bfloat16"), enabled=autocast is not None):
            answers.append(family.predict(denoiser, x, t, batch))
        (answers[-1].float() * x).sum().backward()
        # No constant added to all keys can matter: of `to_k.bias` both gradients are rounding noise.
        wanted = [(name, weight.grad) for name, weight in denoiser.named_parameters() if not name.endswith("to_k.bias")]
        gradients.append({name: gradient.float() for name, gradient in wanted})
    assert torch.equal(*answers)
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("written", ['["Improve:", "Prompt: "]', "lines.txt", "lines.json"])
def test_the_instruction_may_be_json_or_a_file_beside_the_config(make_run, tmp_path, written):
    (tmp_path / "lines.txt").write_text("Improve:\nPrompt: \n")
    (tmp_path / "lines.json").write_text('["Improve:", "Prompt: "]')
    run = replace(make_run("sana", sana_complex_human_instruction=written), config_path=tmp_path / "config.json")
    [encoder] = Sana(run).text_encoders()
    assert encoder.instruction.rstrip() == "Improve:\nPrompt:"


def test_a_missing_instruction_file_is_told(make_run):
    with pytest.raises(UserError, match=r"`nowhere.txt` of `sana_complex_human_instruction` is missing"):
        Sana(make_run("sana", sana_complex_human_instruction="nowhere.txt")).text_encoders()


def test_whatever_alters_all_prompts_alters_the_recipe(make_run, tiny_repo, tmp_path):
    other = shutil.copytree(tiny_repo("sana"), tmp_path / "other")
    tokenizer = other / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("▁cat", "▁cow"))
    runs = [
        make_run("sana"),
        make_run("sana", dtypes=BF16),
        make_run("sana", sana_complex_human_instruction="None"),
        make_run("sana", pretrained_model_name_or_path=str(other)),
    ]
    assert len({Sana(run).text_encoders()[0].recipe.digest for run in runs}) == 4
    assert Sana(make_run("sana")).text_encoders()[0].recipe == Sana(runs[0]).text_encoders()[0].recipe


# latents


def test_latents_are_the_stock_encoders_times_the_scale_alone_even_under_autocast(sana, tiny_repo):
    pixels = torch.rand(2, 3, 96, 128) * 2 - 1
    vae = AutoencoderDC.from_pretrained(tiny_repo("sana") / "vae")
    with torch.no_grad():
        expected = vae.encode(pixels).latent * 0.41407
    with sana.image_encoder().lent("cpu") as encode, torch.autocast("cpu", torch.bfloat16):
        latents = encode(pixels, ["", ""])
    assert latents.dtype == torch.float32
    assert torch.equal(latents, expected)


def test_pictures_beyond_2048_px_are_encoded_in_tiles_that_meet_without_a_seam(sana, tiny_repo):
    column = torch.linspace(-1, 1, 2176).view(1, 1, 1, -1).expand(1, 3, 32, -1)
    vae = AutoencoderDC.from_pretrained(tiny_repo("sana") / "vae")
    with torch.no_grad():
        whole = vae.encode(column).latent * 0.41407
    with sana.image_encoder().lent("cpu") as encode:
        tiled = encode(column, [""])
    assert tiled.shape == (1, 32, 1, 68)
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()


def test_a_picture_is_the_stock_pipelines(sana, stock):
    latents = torch.randn(1, 32, 3, 4)
    with torch.no_grad():
        pixels = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    [expected] = stock.image_processor.postprocess(pixels)
    with sana.image_decoder("cpu") as decode:
        picture = decode(latents, {}, {})
    assert picture.size == (128, 96)
    assert picture.tobytes() == expected.tobytes()


# training


def test_small_and_large_pictures_get_their_own_shift(make_run):
    family = Sana(make_run("sana", flow_schedule_auto_shift=True, flow_use_uniform_schedule=True))
    half = torch.tensor([0.5], dtype=torch.float64)
    for latent_HW in ((4, 4), (32, 16)):
        shift = auto_shift(latent_HW[0] * latent_HW[1])
        assert family.density(latent_HW)(half).item() == pytest.approx(shift / (1 + shift))


def test_by_default_times_are_logit_normal_at_shift_3(sana):
    u = torch.tensor([0.5], dtype=torch.float64)
    assert sana.density((4, 4))(u).item() == pytest.approx(0.75)


class Listener(torch.nn.Module):
    """A denoiser that keeps what it is told."""

    def __init__(self, timestep_scale: float = 1.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(timestep_scale=timestep_scale)

    def forward(self, **heard):
        self.heard = heard
        return (heard["hidden_states"],)


def test_the_denoiser_hears_an_unrounded_float32_timestep(make_run, embeds):
    family, denoiser = Sana(make_run("sana", dtypes=BF16)), Listener()
    t = torch.tensor([0.123456789], dtype=torch.float64)
    family.predict(denoiser, torch.zeros(1, 32, 2, 2), t, family.collate(embeds[:1], []))
    assert denoiser.heard["timestep"].dtype == torch.float32
    assert denoiser.heard["timestep"].item() == pytest.approx(123.456789, abs=1e-5)
    assert denoiser.heard["hidden_states"].dtype == torch.bfloat16
    assert denoiser.heard["encoder_hidden_states"].dtype == torch.bfloat16
    assert denoiser.heard["encoder_attention_mask"].dtype == torch.int64


def test_the_models_own_timestep_scale_is_obeyed(sana, embeds):
    denoiser = Listener(timestep_scale=0.001)
    sana.predict(denoiser, torch.zeros(1, 32, 2, 2), torch.tensor([0.25]), sana.collate(embeds[:1], []))
    assert denoiser.heard["timestep"].item() == pytest.approx(0.25)


def test_a_config_older_than_some_settings_is_read(make_run, tiny_repo, tmp_path, embeds):
    folder = shutil.copytree(tiny_repo("sana"), tmp_path / "old")
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for newer in ("timestep_scale", "guidance_embeds", "qk_norm"):
        del config[newer]
    file.write_text(json.dumps(config))
    old, new = Sana(make_run("sana", pretrained_model_name_or_path=str(folder))), Sana(make_run("sana"))
    x, t, cond = torch.randn(1, 32, 4, 4), torch.tensor([0.4]), new.collate(embeds[:1], [])
    with torch.no_grad():
        assert torch.equal(old.predict(old.load_denoiser(), x, t, cond), new.predict(new.load_denoiser(), x, t, cond))


def test_bf16_weights_take_float32_adapters_without_autocast(make_run, embeds):
    family = Sana(make_run("sana", dtypes=BF16))
    denoiser = family.load_denoiser()
    assert {weight.dtype for weight in denoiser.parameters()} == {torch.bfloat16}
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(family.adapter_presets["attention"])), denoiser)
    for name, weight in denoiser.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    x, t = torch.randn(1, 32, 4, 4), torch.tensor([0.4])
    answer = family.predict(denoiser, x, t, family.collate(embeds[:1], []))
    answer.float().square().mean().backward()
    grads = [weight.grad for name, weight in denoiser.named_parameters() if "lora_B" in name]
    assert len(grads) == 2 * 2 * 4
    assert all(grad is not None and grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize(("interval", "recomputed"), [(1, 2), (2, 1)])
def test_checkpointing_follows_the_options(make_run, interval, recomputed, embeds):
    family = Sana(make_run("sana", gradient_checkpointing_interval=interval))
    denoiser = family.load_denoiser()
    runs = []
    for block in denoiser.transformer_blocks:
        block.ff.register_forward_pre_hook(lambda *_: runs.append(1))
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    family.predict(denoiser, x, torch.tensor([0.4]), family.collate(embeds[:1], [])).sum().backward()
    assert len(runs) == 2 + recomputed


# the gallery


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_a_shot_is_the_stock_pipelines_picture(sana, stock, embeds, guidance):
    shot = replace(SHOT, guidance=guidance)
    expected = stock(
        "a cat", negative_prompt="blurry", width=128, height=96, num_inference_steps=4, guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(5), use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    with sana.sampler(sana.load_denoiser(), "cpu") as sample:
        latents = sample(shot, *embeds, None)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_float32_masters_paint_under_autocast(make_run, embeds):
    painted = []
    for dtypes in ({}, {"dtypes": AUTOCAST}):
        family = Sana(make_run("sana", **dtypes))
        denoiser, seen = family.load_denoiser(), []
        denoiser.transformer_blocks[0].attn1.to_q.register_forward_hook(
            lambda _m, _i, answer, seen=seen: seen.append(answer.dtype)
        )
        with family.sampler(denoiser, "cpu") as sample:
            painted.append((sample(replace(SHOT, steps=2), *embeds, None), set(seen)))
    (exact, in_float32), (rounded, in_bfloat16) = painted
    assert (in_float32, in_bfloat16) == ({torch.float32}, {torch.bfloat16})
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_dropout_is_off_for_a_shot_and_on_again_afterwards(sana, embeds):
    denoiser = sana.load_denoiser()
    inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q"], init_lora_weights=False), denoiser)
    trained = [module for module in denoiser.modules() if isinstance(module, torch.nn.Dropout) and module.p == 0.5]
    for module in trained:
        module.train()
    with sana.sampler(denoiser, "cpu") as sample:
        assert torch.equal(sample(SHOT, *embeds, None), sample(SHOT, *embeds, None))
    assert len(trained) == 4
    assert all(module.training for module in trained)
    assert not denoiser.training


def test_each_step_is_told_with_its_latents(sana, embeds):
    told = []
    with sana.sampler(sana.load_denoiser(), "cpu") as sample:
        latents = sample(SHOT, *embeds, lambda done, latents: told.append((done, latents)))
    assert [done for done, _ in told] == [1, 2, 3, 4]
    assert torch.equal(told[-1][1], latents)
    assert latents.shape == (1, 32, 3, 4)


def test_the_schedulers_shift_may_be_set(make_run, embeds):
    family = Sana(make_run("sana", validation_flow_shift=1.0))
    shipped = Sana(make_run("sana"))
    stock = SanaPipeline.from_pretrained(shipped.run.model.pretrained_model_name_or_path)
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, flow_shift=1.0)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a cat", negative_prompt="blurry", width=128, height=96, num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(5), use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    painted = []
    for one in (family, shipped):
        with one.sampler(one.load_denoiser(), "cpu") as sample:
            painted.append(sample(SHOT, *embeds, None))
    torch.testing.assert_close(painted[0], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(painted[1], expected, atol=1e-2)


def test_sizes_of_another_compression_are_sampled(make_run, tiny_repo, tmp_path):
    folder = shutil.copytree(tiny_repo("sana"), tmp_path / "f8")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "encoder_block_out_channels": [8, 8, 16, 32]}))
    family = Sana(make_run("sana", pretrained_model_name_or_path=str(folder)))
    prompts = encoded(family, [Prompt("a cat"), Prompt("", "uncond")])
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        assert sample(replace(SHOT, width_px=40, height_px=24, steps=1), *prompts, None).shape == (1, 32, 3, 5)


def test_guidance_and_steps_default_to_the_stock_pipelines(sana):
    defaults = inspect.signature(SanaPipeline.__call__).parameters
    assert sana.shot_defaults() == (defaults["guidance_scale"].default, defaults["num_inference_steps"].default)


# files


def adapted(family: Sana, alpha: int) -> tuple[torch.nn.Module, LoraConfig]:
    """A denoiser with an adapter that does something, its alpha not its rank."""
    torch.manual_seed(0)
    denoiser = family.load_denoiser()
    config = LoraConfig(
        r=2, lora_alpha=alpha, target_modules=list(family.adapter_presets["attention"]), init_lora_weights=False
    )
    return inject_adapter_in_model(config, denoiser), config


@pytest.mark.parametrize("alpha", [2, 16])
def test_the_stock_pipeline_paints_our_adapter_as_the_gallery_does(sana, tiny_repo, tmp_path, embeds, alpha):
    denoiser, config = adapted(sana, alpha)
    sana.save_adapter(get_peft_model_state_dict(denoiser), config.to_dict(), tmp_path)
    with sana.sampler(denoiser, "cpu") as sample:
        ours = sample(SHOT, *embeds, None)

    pipeline = SanaPipeline.from_pretrained(tiny_repo("sana"))
    pipeline.set_progress_bar_config(disable=True)

    def paint() -> torch.Tensor:
        return pipeline(
            "a cat", negative_prompt="blurry", width=128, height=96, num_inference_steps=4, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(5), use_resolution_binning=False,
        ).images  # fmt: skip

    base = paint()
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(paint(), ours, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(base, ours, atol=1e-2)
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.0)
    torch.testing.assert_close(paint(), base)


def test_a_saved_denoiser_loads_in_diffusers_and_in_us(sana, tmp_path):
    weights = {name: tensor + 1 for name, tensor in sana.load_denoiser().state_dict().items()}
    folder = sana.save_denoiser(weights, tmp_path)
    assert folder == tmp_path / "transformer"
    stock = SanaTransformer2DModel.from_pretrained(folder).state_dict()
    ours = sana.load_denoiser_weights(tmp_path)
    for name, tensor in weights.items():
        assert torch.equal(stock[name], tensor)
        assert torch.equal(ours[name], tensor)


def test_a_saved_pipeline_paints_with_the_new_weights(sana, stock, tmp_path):
    weights = {name: tensor * 0.5 for name, tensor in sana.load_denoiser().state_dict().items()}
    sana.save_pipeline(weights, tmp_path / "pipeline")
    pipeline = SanaPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(pipeline.transformer.proj_out.weight, stock.transformer.proj_out.weight * 0.5)
    for part in ("vae", "text_encoder"):
        saved, base = getattr(pipeline, part).state_dict(), getattr(stock, part).state_dict()
        assert all(torch.equal(saved[name], base[name]) for name in base)
    assert pipeline.tokenizer("a cat").input_ids == stock.tokenizer("a cat").input_ids


# checks


@pytest.mark.parametrize(
    "options",
    [
        {"model_flavour": "sana1.0-600m-512", "pretrained_model_name_or_path": None},
        {"pretrained_model_name_or_path": "Efficient-Large-Model/Sana_600M_1024px_diffusers"},
    ],
)
def test_bf16_on_fp16_only_weights_is_refused(make_run, options):
    [problem] = Sana.check(make_run("sana", mixed_precision="bf16", **options))
    assert problem.option == "mixed_precision"
    assert "fp16" in problem.what
    assert not list(Sana.check(make_run("sana", mixed_precision="no", **options)))


def test_other_weights_take_bf16(make_run):
    assert not list(Sana.check(make_run("sana", mixed_precision="bf16")))
    assert not list(Sana.check(make_run("sana", mixed_precision="bf16", pretrained_model_name_or_path=None)))


def test_a_torn_list_as_instruction_is_told(make_run):
    [problem] = Sana.check(make_run("sana", sana_complex_human_instruction='["a", '))
    assert problem.option == "sana_complex_human_instruction"


def test_the_snippet_loads_the_base_as_the_run_did(make_run, tmp_path):
    sana = Sana(make_run("sana", variant="fp16", revision="main"))
    said = sana.usage(tmp_path / "pytorch_lora_weights.safetensors", "a cat")
    assert f"from_pretrained({sana.repository.name!r}, revision='main', variant='fp16')" in said
    assert f"from_pretrained({str(tmp_path / 'pipeline')!r})" in sana.usage(tmp_path / "pipeline", "a cat")


def test_the_snippet_makes_the_picture_with_the_gallerys_guidance(make_run, tmp_path):
    said = Sana(make_run("sana", validation_guidance=2.5)).usage(tmp_path / "pipeline", "a cat")
    assert "guidance_scale=2.5)" in said
    assert "guidance_scale" not in Sana(make_run("sana")).usage(tmp_path / "pipeline", "a cat")


@pytest.mark.parametrize(
    ("options", "is_discouraged"),
    [({}, True), ({"pretrained_model_name_or_path": "Efficient-Large-Model/Sana_600M_1024px_diffusers"}, False)],
)
def test_fp16_is_for_the_first_weights_and_discouraged_for_others(make_run, options, is_discouraged):
    run = make_run("sana", mixed_precision="fp16", **options)
    assert not list(Sana.check(run))
    assert any("prefer it" in line for line in Sana.notices(run)) == is_discouraged


def test_no_other_precision_is_discouraged(make_run):
    assert not [line for mixed in ("no", "bf16") for line in Sana.notices(make_run("sana", mixed_precision=mixed))]


def test_sageattention_is_refused_with_the_width_of_the_heads(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_family": "sana", "attention_mechanism": "sageattention", "data_backend_config": []}))
    with pytest.raises(ConfigError, match=r"which Sana cannot use\.\nWhy: .*112 wide .* 64, 96 or 128"):
        parse(["--config_file", str(config)], families=find(), environ={}, cwd=tmp_path)
