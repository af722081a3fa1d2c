"""SD3 against the stock pipeline: what it is, its losses, its pictures, its files."""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch.nn.functional import mse_loss
from training_fakes import Told

from simpletuner.data.samples import Batch, MicroBatch, Place, Prompt, draw_seed
from simpletuner.errors import UserError
from simpletuner.families.sd3 import StableDiffusion3
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import build_tuning
from tests.families.sd3_stock import BF16, SHOT, TOKENS, VARIANTS, encoded, paint


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


def test_a_wrong_flavour_is_told_before_weights_are_fetched(make_run, tiny_repo, tmp_path):
    folder = shutil.copytree(tiny_repo("sd3"), tmp_path / "no weights", ignore=shutil.ignore_patterns("*.safetensors"))
    run = make_run("sd3", pretrained_model_name_or_path=str(folder), model_flavour="medium")
    with pytest.raises(UserError, match="but model_flavour is `medium`"):
        StableDiffusion3(run).verify()


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


def test_packages_kernels_paint_every_picture_and_no_training_step_sees_them(make_run, tmp_path, dispatched, embeds):
    losses, calls = [], dispatched("flash-attn")
    for mechanism in ("diffusers", "flash-attn"):
        options = {"lora_dropout": 0.0, "optimizer": "torch-adamw", "learning_rate": 1e-3, "output_dir": str(tmp_path)}
        run = make_run("sd3", attention_mechanism=mechanism, **options)
        family = StableDiffusion3(run)
        micro = MicroBatch(0, (128, 96), (0,), epoch=0, index=0)
        batch = Batch(torch.ones(1, 16, 12, 16), family.collate(embeds[:1], []), ("a",), False, micro, slot=0, slots=1)
        with Engine(run) as engine:
            denoiser = family.load_denoiser()
            trainer = Trainer(run, engine, family, denoiser, build_tuning(family, denoiser, run), None, [], Told(), steps=1)
            losses.append(trainer.loss(batch))
            losses[-1].mean().backward()
            assert not calls
            with torch.no_grad(), engine.attention(), family.sampler(denoiser, "cpu") as sample:
                losses.append(sample(SHOT, *embeds, None))
            assert bool(calls) == (mechanism == "flash-attn")
            count = len(calls)
            losses.append(trainer.loss(batch))
            assert len(calls) == count
            calls.clear()
    assert all(torch.equal(one, other) for one, other in zip(losses[:3], losses[3:], strict=True))


def test_heads_that_the_kernels_cannot_serve_are_told_by_the_small_files_alone(make_run):
    family = StableDiffusion3(make_run("sd3", attention_mechanism="sageattention"))
    with pytest.raises(UserError, match=r"heads of `.*` are 16 wide\.\nWhy:  its kernels are for widths of 64, 96 or 128"):
        _ = family.latent


def test_a_package_that_cannot_be_imported_is_told_before_any_work(make_run):
    family = StableDiffusion3(make_run("sd3", attention_mechanism="flash-attn"))
    with pytest.raises(
        UserError, match=r"`flash_attn`, which cannot be used: [\s\S]*pip install --no-build-isolation flash-attn"
    ):
        family.verify()


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


def test_a_preview_is_the_stock_pipelines_picture_with_the_tiny_autoencoder(make_run, tiny_repo):
    family = StableDiffusion3(make_run("sd3"))
    tiny = AutoencoderTiny.from_pretrained(tiny_repo("sd3") / "taesd3")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo("sd3"), vae=tiny)
    latents = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(5))
    unscaled = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    with torch.no_grad():
        stock = pipeline.image_processor.postprocess(pipeline.vae.decode(unscaled, return_dict=False)[0], output_type="pil")
    with family.preview_decoder("cpu") as show:
        assert show(latents).tobytes() == stock[0].tobytes()


def test_a_tiny_autoencoder_is_loaded_without_warnings_of_a_key_that_diffusers_wrote_itself(make_run, monkeypatch):
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [handler])
    with StableDiffusion3(make_run("sd3")).preview_decoder("cpu") as show:
        show(torch.zeros(1, 16, 4, 4))
    assert heard == []


def test_the_preview_s_autoencoder_is_looked_for_before_any_work(make_run, tmp_path):
    missing = {"sd3_preview_decoder_model_name_or_path": str(tmp_path)}
    StableDiffusion3(make_run("sd3", **missing)).verify()
    StableDiffusion3(make_run("sd3", **missing, validation_preview=True)).verify()  # there is no gallery
    with pytest.raises(UserError, match="no safetensors weights"):
        StableDiffusion3(make_run("sd3", **missing, validation_preview=True, validation_prompt="a cat")).verify()


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
    for name, value in family.shot_settings().items():
        assert name == "skip_guidance_layers" or value == defaults[name].default, name
    assert family.shot_defaults() == (3.0, defaults["num_inference_steps"].default)
    assert StableDiffusion3(make_run("sd3")).shot_settings() == {}


def test_a_block_that_is_not_there_cannot_be_skipped(make_run):
    family = StableDiffusion3(make_run("sd3", validation_guidance_skip_layers=(2, 4, 9)))
    with pytest.raises(UserError, match=r"names 4, 9, but `.*` has 4 blocks, 0 to 3"):
        _ = family.latent


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_the_schedulers_shift_may_be_set_whatever_it_ships(make_run, tiny_repo, tmp_path, embeds, is_dynamic):
    folder = shutil.copytree(tiny_repo("sd3"), tmp_path / "copy")
    change(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=is_dynamic)
    family = StableDiffusion3(make_run("sd3", validation_flow_shift=1.0, pretrained_model_name_or_path=str(folder)))
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
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=list(sd3.adapter_presets["attention"]), init_lora_weights=False)
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
    family = StableDiffusion3(
        make_run("sd3", validation_guidance=4.0, validation_num_inference_steps=20, tokenizer_max_length=77, **SLG)
    )
    said = family.usage(tmp_path / "pipeline", "a cat")
    for setting in (
        "guidance_scale=4.0",
        "num_inference_steps=20",
        "max_sequence_length=77",
        "skip_guidance_layers=[0, 2]",
        "height=128",
    ):
        assert setting in said
    assert "guidance_scale=3.0" in StableDiffusion3(make_run("sd3")).usage(tmp_path / "pipeline", "a cat")


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
