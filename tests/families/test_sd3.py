"""SD3 against the stock pipeline: prompts, latents, schedules, guidance, files."""

from __future__ import annotations

import gc
import inspect
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss
from training_fakes import Told

from simpletuner.config.run import Dtypes
from simpletuner.data.prompts import PromptStore
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Batch, MicroBatch, Place, Prompt, draw_seed
from simpletuner.errors import UserError
from simpletuner.families.base import Shot
from simpletuner.families.sd3 import StableDiffusion3
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning

BF16 = Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16")
PROMPTS = ["A Photo of a CAT", "", "two dogs, 犬🐶, in the RAIN!\n", "word " * 400]
SHOT = Shot("n", 0, "a cat", "blurry", width_px=128, height_px=96, seed=5, guidance=4.5, steps=6)
VARIANTS = ["sd3", "sd3.5-medium", "sd3.5-large"]
TOKENS = {"max_sequence_length": 154}


@pytest.fixture(scope="module")
def stock(tiny_repo) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo("sd3"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sd3(make_run) -> StableDiffusion3:
    return StableDiffusion3(make_run("sd3"))


@pytest.fixture
def embeds(sd3):
    return encoded(sd3, [Prompt("a cat"), Prompt("blurry", "uncond")])


def encoded(family: StableDiffusion3, prompts: list[Prompt]) -> list[dict[str, torch.Tensor]]:
    merged: list[dict[str, torch.Tensor]] = [{} for _ in prompts]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            for one, part in zip(merged, encode(prompts), strict=True):
                one.update(part)
    return merged


def paint(pipeline: StableDiffusion3Pipeline, **settings: object) -> torch.Tensor:
    """SHOT by the stock pipeline, from the text on."""
    arguments = {"negative_prompt": "blurry", "num_inference_steps": 6, "guidance_scale": 4.5, **TOKENS, **settings}
    generator = torch.Generator("cpu").manual_seed(5)
    return pipeline("a cat", width=128, height=96, generator=generator, output_type="latent", **arguments).images


# what the repository says


def test_the_latent_grid_is_read_from_the_repository(sd3):
    latent = sd3.latent
    assert latent.grid(128, 96) == (12, 16)
    assert (latent.channels, latent.cell_px, latent.native_edge_px, latent.alignment_px) == (16, 8, 128, 16)


def test_full_size_buckets_are_multiples_of_64_px(make_run, tiny_repo, tmp_path):
    folder = shutil.copytree(tiny_repo("sd3"), tmp_path / "full")
    change(folder / "transformer" / "config.json", sample_size=128)
    latent = StableDiffusion3(make_run("sd3", pretrained_model_name_or_path=str(folder))).latent
    assert (latent.native_edge_px, latent.alignment_px) == (1024, 64)


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(("flavour", "model"), [(None, "3.5-medium"), ("medium", "3.5-medium"), ("large", "3.5-large")])
def test_without_a_path_the_flavours_repository_is_used(make_run, tiny_repo, tmp_path, monkeypatch, flavour, model):
    name = f"stabilityai/stable-diffusion-{model}"
    shutil.copytree(tiny_repo(f"sd{model}"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    family = StableDiffusion3(make_run("sd3", pretrained_model_name_or_path=None, model_flavour=flavour))
    assert family.repository.name == name
    assert family.latent.native_edge_px == 128


@pytest.mark.parametrize(("variant", "found"), [("sd3", "SD3.0"), ("sd3.5-large", "SD3.5-large")])
def test_a_folder_of_another_kind_than_the_flavour_is_named(make_run, tiny_repo, variant, found):
    run = make_run("sd3", pretrained_model_name_or_path=str(tiny_repo(variant)), model_flavour="medium")
    with pytest.raises(UserError, match=rf"holds {re.escape(found)} \(4 blocks\), but model_flavour is `medium`"):
        _ = StableDiffusion3(run).latent


def test_another_familys_folder_is_named(make_run, tiny_repo):
    with pytest.raises(UserError, match="holds a SanaPipeline, but model_family is `sd3`"):
        _ = StableDiffusion3(make_run("sd3", pretrained_model_name_or_path=str(tiny_repo("sana")))).latent


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_model_trains(make_run, tiny_repo, variant):
    family = StableDiffusion3(make_run("sd3", pretrained_model_name_or_path=str(tiny_repo(variant)), lora_rank=2))
    denoiser = family.load_denoiser()
    attentions = 6 if variant == "sd3.5-medium" else 4
    tuning = build_tuning(family, denoiser, family.run)
    assert len(tuning.parameters()) == 2 * 4 * attentions
    assert not any("add_" in name or "context" in name for name in tuning.parameters())
    cond = family.collate(encoded(family, [Prompt("a cat")]), [])
    family.predict(denoiser, torch.randn(1, 16, 8, 8), torch.tensor([0.4]), cond).square().mean().backward()
    grads = [weight.grad for name, weight in tuning.parameters().items() if "lora_B" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_norms_and_ends_are_what_a_quantised_base_keeps_whole(make_run, tiny_repo):
    from fnmatch import fnmatch

    family = StableDiffusion3(make_run("sd3", pretrained_model_name_or_path=str(tiny_repo("sd3.5-medium"))))
    linears = [name for name, part in family.load_denoiser().named_modules() if isinstance(part, torch.nn.Linear)]
    stored = {
        re.sub(r"\.\d+\.", ".", name, count=1) for name in linears if not any(fnmatch(name, each) for each in family.kept_whole)
    }
    attention = {f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")}
    attention |= {f"attn.add_{part}_proj" for part in "qkv"}
    second = {f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    feeds = {f"{part}.net.{end}" for part in ("ff", "ff_context") for end in ("0.proj", "2")}
    assert stored == {f"transformer_blocks.{part}" for part in attention | second | feeds}


# prompts


@pytest.mark.parametrize("tokens", [77, 154])
@pytest.mark.parametrize("dtypes", [{"dtypes": BF16}, {}], ids=["bf16", "fp32"])
def test_prompts_equal_the_stock_pipelines_bit_for_bit(make_run, tiny_repo, dtypes, tokens):
    family = StableDiffusion3(make_run("sd3", tokenizer_max_length=tokens, **dtypes))
    dtype = getattr(torch, family.run.dtypes.text)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo("sd3"), torch_dtype=dtype, transformer=None, vae=None)
    with torch.no_grad():
        cond, uncond, pooled, uncond_pooled = pipeline.encode_prompt(
            PROMPTS, None, None, negative_prompt=PROMPTS, max_sequence_length=tokens
        )
    for role, prompt_BLD, pooled_BD in (("cond", cond, pooled), ("uncond", uncond, uncond_pooled)):
        ours = family.collate(encoded(family, [Prompt(text, role) for text in PROMPTS]), [])
        assert ours["prompt_BLD"].dtype == ours["pooled_BD"].dtype == dtype
        assert ours["prompt_BLD"].shape == (4, 77 + tokens, 64)
        assert torch.equal(ours["prompt_BLD"], prompt_BLD)
        assert torch.equal(ours["pooled_BD"], pooled_BD)


def test_zero_padding_of_t5_is_the_stock_embeds_times_the_tokenizers_mask(make_run, stock):
    family = StableDiffusion3(make_run("sd3", t5_padding="zero"))
    with torch.no_grad():
        prompt_BLD, _, _, _ = stock.encode_prompt(PROMPTS, None, None, **TOKENS)
    mask_BL = stock.tokenizer_3(PROMPTS, padding="max_length", max_length=154, truncation=True, return_tensors="pt")[
        "attention_mask"
    ]
    prompt_BLD[:, 77:] *= mask_BL[..., None]
    embeds = encoded(family, [Prompt(text) for text in PROMPTS])
    assert [len(one["t5_LD"]) for one in embeds] == mask_BL.sum(1).tolist()
    assert torch.equal(family.collate(embeds, [])["prompt_BLD"], prompt_BLD)


@pytest.mark.parametrize(
    ("options", "is_clip_zero", "is_t5_zero"),
    [
        ({}, False, False),
        ({"sd3_clip_uncond_behaviour": "zero"}, True, True),
        ({"sd3_clip_uncond_behaviour": "zero", "sd3_t5_uncond_behaviour": "empty_string"}, True, False),
        ({"sd3_t5_uncond_behaviour": "zero"}, False, True),
    ],
)
def test_dropped_captions_and_the_gallerys_uncond_are_what_was_asked_for(make_run, stock, options, is_clip_zero, is_t5_zero):
    family = StableDiffusion3(make_run("sd3", **options))
    texts = ["", "a cat", "blurry"]
    with torch.no_grad():
        expected_BLD, _, pooled_BD, _ = stock.encode_prompt(texts, None, None, **TOKENS)
    if is_clip_zero:
        expected_BLD[0, :77], pooled_BD[0] = 0, 0
    if is_t5_zero:
        expected_BLD[0, 77:] = 0
    ours = family.collate(encoded(family, [Prompt("", "uncond"), Prompt("a cat"), Prompt("blurry", "uncond")]), [])
    assert torch.equal(ours["prompt_BLD"], expected_BLD)
    assert torch.equal(ours["pooled_BD"], pooled_BD)


def test_an_empty_caption_of_a_picture_is_encoded_whatever_the_uncond_is(make_run):
    family = StableDiffusion3(make_run("sd3", sd3_clip_uncond_behaviour="zero"))
    [caption, dropped] = encoded(family, [Prompt(""), Prompt("", "uncond")])
    assert all(tensor.abs().sum() > 0 for tensor in caption.values())
    assert all(tensor.abs().sum() == 0 for tensor in dropped.values())


def test_zeros_that_can_be_rebuilt_are_not_cached(sd3):
    [embed] = encoded(sd3, [Prompt("a cat")])
    shapes = {name: tuple(tensor.shape) for name, tensor in embed.items()}
    clips = {"clip_1_LD": (77, 24), "clip_2_LD": (77, 32), "pooled_1_D": (24,), "pooled_2_D": (32,)}
    assert shapes == {**clips, "t5_LD": (154, 64)}


ALTERS = {  # option -> which of the three encoders' embeds it alters
    ("tokenizer_max_length", 77): [False, False, True],
    ("t5_padding", "zero"): [False, False, True],
    ("sd3_t5_uncond_behaviour", "zero"): [False, False, True],
    ("sd3_clip_uncond_behaviour", "zero"): [True, True, True],
    ("text_encoder_1_precision", "int8-quanto"): [True, False, False],
    ("text_encoder_2_precision", "int8-quanto"): [False, True, False],
    ("text_encoder_3_precision", "int8-quanto"): [False, False, True],
    ("dtypes", BF16): [True, True, True],
    ("sd3_t5_uncond_behaviour", "empty_string"): [False, False, False],
    ("validation_guidance_skip_layers", (1,)): [False, False, False],
    ("quantize_via", "cpu"): [False, False, False],
}


@pytest.mark.parametrize(("option", "expected"), [pytest.param(*pair, id=str(pair[0])) for pair in ALTERS.items()])
def test_a_recipe_changes_with_what_alters_its_embeds_and_with_nothing_else(make_run, sd3, option, expected):
    before = [encoder.recipe.digest for encoder in sd3.text_encoders()]
    family = StableDiffusion3(make_run("sd3", **dict([option])))
    after = [encoder.recipe.digest for encoder in family.text_encoders()]
    assert [one != other for one, other in zip(before, after, strict=True)] == expected


def live_bytes() -> int:
    """Bytes of every parameter there is, as the garbage collector knows them."""
    gc.collect()
    return sum(weight.nbytes for weight in gc.get_objects() if type(weight) is torch.nn.Parameter)


def test_no_two_text_encoders_are_ever_in_memory_together(sd3, tmp_path):
    encoders = sd3.text_encoders()
    recipes = [encoder.recipe for encoder in encoders]
    prompts = PromptStore(tmp_path, recipes, write_batch_size=8, text_encoder_batch_size=2)
    before, measured = live_bytes(), []
    for encoder in encoders:
        live: list[int] = []
        prompts.fill(
            encoder,
            [Prompt(text) for text in PROMPTS],
            device="cpu",
            ranks=Alone(),
            tell=lambda _, live=live: live.append(live_bytes() - before),  # told before, between and after the batches
        )
        measured.append(live)
    sizes = [sum(weight.nbytes for weight in encoder.load().parameters()) for encoder in encoders]
    assert [max(live) for live in measured] == sizes, "the text stage needs as much as its largest encoder"
    assert [(live[0], live[-1]) for live in measured] == [(0, 0)] * 3, "each is gone before the next one comes"


# latents


def test_latents_are_the_stock_posterior_drawn_by_the_pictures_key(sd3, tiny_repo):
    pixels = torch.rand(2, 3, 96, 128) * 2 - 1
    posterior = AutoencoderKL.from_pretrained(tiny_repo("sd3") / "vae").encode(pixels).latent_dist
    seeds = [draw_seed(key, "posterior") for key in ("aa", "bb")]
    noise = torch.stack([torch.randn(16, 12, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    expected = (posterior.mean + (0.5 * posterior.logvar).exp() * noise - 0.0609) * 1.5305
    with sd3.image_encoder().lent("cpu") as encode, torch.autocast("cpu", torch.bfloat16):
        latents, again, other = (encode(pixels, keys) for keys in (["aa", "bb"], ["aa", "bb"], ["aa", "cc"]))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(latents, again)
    assert torch.equal(latents[0], other[0])
    assert not torch.allclose(latents[1], other[1], atol=1e-3)


def test_a_picture_is_the_stock_pipelines(sd3, stock):
    latents = torch.randn(1, 16, 12, 16)
    with torch.no_grad():
        pixels = stock.vae.decode(latents / stock.vae.config.scaling_factor + stock.vae.config.shift_factor).sample
    [expected] = stock.image_processor.postprocess(pixels)
    with sd3.image_decoder("cpu") as decode:
        picture = decode(latents, {})
    assert picture.size == (128, 96)
    assert picture.tobytes() == expected.tobytes()


# training


@pytest.mark.parametrize(("edge_px", "shift"), [(512, 1.878), (768, 2.332), (1024, 3.158)])
def test_the_automatic_shift_counts_patches(make_run, edge_px, shift):
    family = StableDiffusion3(make_run("sd3", flow_schedule_auto_shift=True, flow_use_uniform_schedule=True))
    median = family.density((edge_px // 8, edge_px // 8))(torch.tensor([0.5], dtype=torch.float64)).item()
    assert median / (1 - median) == pytest.approx(shift, abs=5e-4)


def test_by_default_times_are_logit_normal_at_shift_3(sd3):
    median = sd3.density((16, 16))(torch.tensor([0.5], dtype=torch.float64)).item()
    assert median == pytest.approx(0.75)


class Listener(torch.nn.Module):
    """A denoiser that keeps what it is told."""

    config = SimpleNamespace(in_channels=16, patch_size=2)

    def forward(self, **heard):
        self.heard = heard
        return (heard["hidden_states"],)


def test_the_denoiser_hears_an_unrounded_float32_timestep(make_run, embeds):
    family, denoiser = StableDiffusion3(make_run("sd3", dtypes=BF16)), Listener()
    t = torch.tensor([0.123456789], dtype=torch.float64)
    family.predict(denoiser, torch.zeros(1, 16, 2, 2), t, family.collate(embeds[:1], []))
    assert denoiser.heard["timestep"].dtype == torch.float32
    assert denoiser.heard["timestep"].item() == pytest.approx(123.456789, abs=1e-5)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        assert denoiser.heard[name].dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_first_loss_is_that_of_plain_torch(make_run, tiny_repo, stock, tmp_path, model_type):
    """Everything written out once more: times, noise, mixing, target and mean, with the stock embeds and denoiser."""
    run = make_run(
        "sd3", model_type=model_type, lora_dropout=0.0, optimizer="torch-adamw", learning_rate=1e-3, output_dir=str(tmp_path)
    )
    family = StableDiffusion3(run)
    latents = torch.randn(2, 16, 12, 16, generator=torch.Generator().manual_seed(1))
    cond = family.collate(encoded(family, [Prompt("a cat"), Prompt("", "uncond")]), [Place((1, 1), (1, 1), (0, 0), (1, 1))] * 2)
    micro = MicroBatch(0, (128, 96), (0, 1), epoch=3, index=8)
    batch = Batch(latents, cond, ("a", "b"), False, micro, slot=2, slots=8)
    with Engine(run) as engine:
        denoiser = family.load_denoiser()
        trainer = Trainer(run, engine, family, denoiser, build_tuning(family, denoiser, run), None, [], Told(), steps=1)
        ours = trainer.loss(batch)

    torch.manual_seed(draw_seed(run.training.seed, 3, 8))
    u = (torch.tensor([2.0, 3.0], dtype=torch.float64) + torch.rand(2, dtype=torch.float64)) / 8
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0).icdf(u)
    sigma = 1 / (1 + torch.exp(-normal))
    sigma = (3 * sigma / (1 + 2 * sigma)).float().view(2, 1, 1, 1)
    noise = torch.randn(2, 16, 12, 16)
    with torch.no_grad():
        prompt, _, pooled, _ = stock.encode_prompt(["a cat", ""], None, None, **TOKENS)
        transformer = SD3Transformer2DModel.from_pretrained(tiny_repo("sd3") / "transformer")
        answer = transformer((1 - sigma) * latents + sigma * noise, prompt, pooled, sigma.flatten() * 1000).sample
    expected = mse_loss(answer, noise - latents, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("interval", "recomputed"), [(1, 4), (2, 2), (3, 2)])
def test_checkpointing_follows_the_options(make_run, interval, recomputed, embeds):
    family = StableDiffusion3(make_run("sd3", gradient_checkpointing_interval=interval))
    denoiser = family.load_denoiser()
    runs = []
    for block in denoiser.transformer_blocks:
        block.ff.register_forward_pre_hook(lambda *_: runs.append(1))
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    family.predict(denoiser, x, torch.tensor([0.4]), family.collate(embeds[:1], [])).sum().backward()
    assert len(runs) == 4 + recomputed


# the gallery


@pytest.mark.parametrize("guidance", [4.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shot_is_the_stock_pipelines_picture(make_run, tiny_repo, variant, guidance):
    family = StableDiffusion3(make_run("sd3", pretrained_model_name_or_path=str(tiny_repo(variant))))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo(variant))
    pipeline.set_progress_bar_config(disable=True)
    prompts = encoded(family, [Prompt("a cat"), Prompt("blurry", "uncond")])
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        latents = sample(replace(SHOT, guidance=guidance), *prompts, None)
    torch.testing.assert_close(latents, paint(pipeline, guidance_scale=guidance), atol=1e-5, rtol=1e-5)


def test_a_half_precision_shot_is_the_stock_pipelines_as_well(make_run, tiny_repo):
    family = StableDiffusion3(make_run("sd3", dtypes=BF16))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo("sd3"), torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    prompts = encoded(family, [Prompt("a cat"), Prompt("blurry", "uncond")])
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        latents = sample(SHOT, *prompts, None)
    noise = torch.randn(1, 16, 12, 16, generator=torch.Generator("cpu").manual_seed(5))
    expected = paint(pipeline, latents=noise).float()
    assert (latents - expected).abs().mean() < 0.02 * expected.abs().mean()


SLG = {
    "validation_guidance_skip_layers": (0, 2),
    "validation_guidance_skip_scale": 1.7,
    "validation_guidance_skip_layers_start": 0.1,
    "validation_guidance_skip_layers_stop": 0.6,
}
STOCK_SLG = {
    "skip_guidance_layers": [0, 2],
    "skip_layer_guidance_scale": 1.7,
    "skip_layer_guidance_start": 0.1,
    "skip_layer_guidance_stop": 0.6,
}


def test_skip_layer_guidance_is_the_stock_pipelines(make_run, stock, embeds):
    family = StableDiffusion3(make_run("sd3", **SLG))
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        latents = sample(SHOT, *embeds, None)
    torch.testing.assert_close(latents, paint(stock, **STOCK_SLG), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(latents, paint(stock), atol=1e-2)


def test_skip_layer_guidance_runs_once_more_in_each_step_of_its_window_on_the_prompt(make_run, embeds):
    family = StableDiffusion3(make_run("sd3", **SLG))
    denoiser, batches = family.load_denoiser(), []
    denoiser.transformer_blocks[1].register_forward_pre_hook(lambda *_: batches.append("run"))
    skipped = []
    denoiser.transformer_blocks[0].register_forward_pre_hook(lambda *_: skipped.append("run"))
    with family.sampler(denoiser, "cpu") as sample:
        sample(SHOT, *embeds, None)
    assert (len(batches), len(skipped)) == (6 + 3, 6), "steps 1, 2 and 3 of 6"


def test_its_defaults_are_the_stock_pipelines_own(make_run):
    defaults = inspect.signature(StableDiffusion3Pipeline.__call__).parameters
    family = StableDiffusion3(make_run("sd3", validation_guidance_skip_layers=(1, 2)))
    for name, value in family.skip_layers().items():
        assert name == "skip_guidance_layers" or value == defaults[name].default, name
    assert family.shot_defaults() == (3.0, defaults["num_inference_steps"].default)
    assert StableDiffusion3(make_run("sd3")).skip_layers() == {}


def test_a_block_that_is_not_there_cannot_be_skipped(make_run):
    family = StableDiffusion3(make_run("sd3", validation_guidance_skip_layers=(2, 4, 9)))
    with pytest.raises(UserError, match=r"names 4, 9, but `.*` has 4 blocks, 0 to 3"):
        _ = family.latent


def test_the_schedulers_shift_may_be_set(make_run, tiny_repo, embeds):
    family = StableDiffusion3(make_run("sd3", validation_flow_shift=1.0))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo("sd3"))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        latents = sample(SHOT, *embeds, None)
    torch.testing.assert_close(latents, paint(pipeline), atol=1e-5, rtol=1e-5)


def test_each_step_is_told_with_its_latents(sd3, embeds):
    told = []
    with sd3.sampler(sd3.load_denoiser(), "cpu") as sample:
        latents = sample(SHOT, *embeds, lambda done, latents: told.append((done, latents)))
    assert [done for done, _ in told] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(told[-1][1], latents)


# files


@pytest.mark.parametrize("alpha", [2, 16])
def test_the_stock_pipeline_paints_our_adapter_as_the_gallery_does(sd3, tiny_repo, tmp_path, embeds, alpha):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=list(sd3.adapter_targets), init_lora_weights=False)
    denoiser = inject_adapter_in_model(config, sd3.load_denoiser())
    sd3.save_adapter(get_peft_model_state_dict(denoiser), config.to_dict(), tmp_path)
    with sd3.sampler(denoiser, "cpu") as sample:
        ours = sample(SHOT, *embeds, None)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo("sd3"))
    pipeline.set_progress_bar_config(disable=True)
    base = paint(pipeline)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(paint(pipeline), ours, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(base, ours, atol=1e-2)


def test_a_saved_pipeline_paints_with_the_new_weights(sd3, stock, tmp_path):
    weights = {name: tensor * 0.5 for name, tensor in sd3.load_denoiser().state_dict().items()}
    sd3.save_pipeline(weights, tmp_path / "pipeline")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(pipeline.transformer.proj_out.weight, stock.transformer.proj_out.weight * 0.5)
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        saved, base = getattr(pipeline, part).state_dict(), getattr(stock, part).state_dict()
        assert all(torch.equal(saved[name], base[name]) for name in base)
    assert pipeline.tokenizer_2("a cat").input_ids == stock.tokenizer_2("a cat").input_ids


def test_the_snippet_paints_as_the_gallery_does(make_run, tmp_path):
    family = StableDiffusion3(make_run("sd3", validation_guidance=4.0, tokenizer_max_length=77, **SLG))
    said = family.usage(tmp_path / "pipeline", "a cat")
    for setting in ("guidance_scale=4.0", "max_sequence_length=77", "skip_guidance_layers=[0, 2]", "height=128"):
        assert setting in said
    assert "guidance_scale=3.0" in StableDiffusion3(make_run("sd3")).usage(tmp_path / "pipeline", "a cat")


# a single file


def published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Diffusers' names -> those of the published files, in which queries, keys and values are one matrix.

    The last block's text branch and the final layer say (shift, scale) there, where diffusers has (scale, shift).
    """
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks"))
    file: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if name.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if match := re.fullmatch(r"(.*qkv)\.([qkv])(\..*)", name):
            parts.setdefault(match[1] + match[3], {})[match[2]] = tensor
        else:
            file[name] = tensor.contiguous()
    file |= {name: torch.cat([each[letter] for letter in "qkv"]) for name, each in parts.items()}
    return {f"model.diffusion_model.{name}": tensor for name, tensor in file.items()}


NAMES = [
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^time_text_embed\.timestep_embedder\.linear_(\d)", lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"^time_text_embed\.text_embedder\.linear_(\d)", lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
    (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
    (
        r"\.ff(_context)?\.net\.(\S+?)\.(weight|bias)",
        lambda m: f".{'context' if m[1] else 'x'}_block.mlp.fc{FEEDS[m[2]]}.{m[3]}",
    ),
    (r"\.(attn2?)\.to_([qkv])", r".x_block.\1.qkv.\2"),
    (r"\.(attn2?)\.add_([qkv])_proj", r".context_block.\1.qkv.\2"),
    (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
    (r"\.attn\.to_add_out", ".context_block.attn.proj"),
    (r"\.(attn2?)\.norm_added_([qk])", r".context_block.\1.ln_\2"),
    (r"\.(attn2?)\.norm_([qk])", r".x_block.\1.ln_\2"),
]
FEEDS = {"0.proj": 1, "2": 2}


@pytest.fixture(scope="module")
def files(tiny_repo, tmp_path_factory):
    """Model -> its transformer as a single file in the published layout."""
    folder = tmp_path_factory.mktemp("files")
    for variant in VARIANTS:
        weights = load_file(tiny_repo(variant) / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("norm_out.linear.weight", "proj_out.weight"):
            weights[name] = weights[name] + 1  # so that it cannot be mistaken for the folder's
        save_file(weights, folder / f"{variant}-diffusers.safetensors")
        save_file({**published(weights), "first_stage_model.x": torch.zeros(1)}, folder / f"{variant}.safetensors")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_published_single_file_becomes_the_transformer_of_its_repository(make_run, tiny_repo, files, variant):
    options = {"pretrained_model_name_or_path": str(tiny_repo(variant))}
    file = files / f"{variant}.safetensors"
    family = StableDiffusion3(make_run("sd3", pretrained_transformer_model_name_or_path=str(file), dtypes=BF16, **options))
    family.verify()
    loaded = family.load_denoiser()
    wanted = load_file(files / f"{variant}-diffusers.safetensors")
    found = loaded.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in wanted)
    assert not loaded.training


def test_a_file_in_diffusers_layout_is_taken_as_well_and_a_full_tuning_saves_its_weights(make_run, files, tmp_path):
    file = files / "sd3-diffusers.safetensors"
    family = StableDiffusion3(make_run("sd3", pretrained_transformer_model_name_or_path=str(file)))
    family.verify()
    weights = family.load_denoiser().state_dict()
    family.save_pipeline(weights, tmp_path / "pipeline")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(pipeline.transformer.proj_out.weight, load_file(file)["proj_out.weight"])


def test_the_snippet_for_an_adapter_takes_the_transformer_from_the_file(make_run, stock, files, tmp_path):
    file = files / "sd3.safetensors"
    family = StableDiffusion3(make_run("sd3", pretrained_transformer_model_name_or_path=str(file)))
    lines = family.usage(tmp_path / "pytorch_lora_weights.safetensors", "a cat").splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines[:2]), names)
    weight = names["pipeline"].transformer.norm_out.linear.weight
    assert torch.equal(weight, stock.transformer.norm_out.linear.weight + 1)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sd3.5-large.safetensors", r"holds the transformer of SD3.5-large \(4 blocks\), but `.*` is SD3.0 \(4 blocks\)"),
        ("vae.safetensors", "holds no SD3 transformer"),
        ("torn.safetensors", "is not a whole safetensors file"),
        ("model.ckpt", "which is no safetensors file"),
    ],
)
def test_a_single_file_that_does_not_belong_there_is_named_before_any_work(make_run, tiny_repo, files, tmp_path, name, told):
    shutil.copyfile(tiny_repo("sd3") / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((files / "sd3.safetensors").read_bytes()[:-5])
    (tmp_path / "model.ckpt").write_bytes(b"")
    path = tmp_path / name if (tmp_path / name).exists() else files / name
    family = StableDiffusion3(make_run("sd3", pretrained_transformer_model_name_or_path=str(path)))
    with pytest.raises(UserError, match=told):
        family.verify()


def test_a_file_of_the_right_kind_that_lacks_a_weight_is_told(make_run, files, tmp_path):
    weights = load_file(files / "sd3.safetensors")
    del weights["model.diffusion_model.joint_blocks.2.x_block.mlp.fc1.bias"]
    save_file(weights, tmp_path / "lacking.safetensors")
    run = make_run("sd3", pretrained_transformer_model_name_or_path=str(tmp_path / "lacking.safetensors"))
    with pytest.raises(UserError, match=r"cannot be loaded: .*joint_blocks.2.x_block.mlp.fc1.bias"):
        StableDiffusion3(run).load_denoiser()


# checks


def test_more_tokens_than_were_trained_on_need_a_word(make_run):
    [problem] = StableDiffusion3.check(make_run("sd3", tokenizer_max_length=256))
    assert (problem.option, problem.overridable) == ("tokenizer_max_length", True)
    assert not list(StableDiffusion3.check(make_run("sd3", tokenizer_max_length=77)))


def test_a_single_file_as_the_whole_model_is_refused_with_the_option_for_it(make_run):
    [problem] = StableDiffusion3.check(make_run("sd3", pretrained_model_name_or_path="sd3.5_medium.safetensors"))
    assert "pretrained_transformer_model_name_or_path" in problem.mend


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, []),
        ({"validation_guidance": 4.0}, []),
        ({"validation_guidance": 6.5}, ["validation_guidance 6.5 is high for skip-layer guidance"]),
        ({"validation_num_inference_steps": 6}, []),
        ({"validation_num_inference_steps": 5}, ["of 5 steps none lies between 0.01 and 0.2"]),
        ({"validation_guidance": 1.0}, ["Skip-layer guidance has no effect: validation_guidance is 1"]),
        ({"validation_guidance": 6.5, "validation_guidance_skip_layers": None}, []),
    ],
)
def test_skip_layer_guidance_that_cannot_do_well_is_told(make_run, options, told):
    notices = list(StableDiffusion3.notices(make_run("sd3", **{"validation_guidance_skip_layers": (1, 2), **options})))
    assert len(notices) == len(told)
    assert all(expected in notice for expected, notice in zip(told, notices, strict=True))
