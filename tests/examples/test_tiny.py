"""The builder of tiny repositories: real classes, offline, repeatable, and no text that is unknown to them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

from simpletuner.errors import UserError
from simpletuner.examples.tiny import BUILDERS, build_model, model_options
from simpletuner.families import find


def test_every_family_has_a_tiny_repository():
    assert set(BUILDERS) >= set(find())


def test_the_stock_pipeline_paints_with_a_tiny_sana(tiny_repo):
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(tiny_repo("sana"))
    pipeline.set_progress_bar_config(disable=True)
    [picture] = pipeline("A cat", height=128, width=96, num_inference_steps=2, use_resolution_binning=False).images
    assert picture.size == (96, 128)


def test_the_stock_prior_paints_with_a_tiny_stable_cascade(tiny_repo):
    from diffusers import StableCascadePriorPipeline

    pipeline = StableCascadePriorPipeline.from_pretrained(tiny_repo("stable_cascade") / "stable-cascade-prior")
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("A cat", height=256, width=384, num_inference_steps=2).image_embeddings
    assert latents.shape == (1, 16, 6, 9)


def test_the_tiny_stable_cascade_is_laid_out_as_its_two_repositories(tiny_repo):
    """As the hub's `stabilityai/stable-cascade-prior` and `stabilityai/stable-cascade`, as far as they are read."""
    prior, decoder = (tiny_repo("stable_cascade") / name for name in ("stable-cascade-prior", "stable-cascade"))
    shared = {"model_index.json", "scheduler", "text_encoder", "tokenizer"}
    loose = {"effnet_encoder.safetensors", "previewer.safetensors"}
    of_pictures = {"feature_extractor", "image_encoder"}
    assert {path.name for path in prior.iterdir()} == shared | of_pictures | {"prior", "prior_lite"}
    assert {path.name for path in decoder.iterdir()} == shared | loose | {"decoder", "decoder_lite", "vqgan"}
    assert model_options("stable_cascade", prior.parent) == {
        "pretrained_model_name_or_path": str(prior),
        "stable_cascade_decoder_model_name_or_path": str(decoder),
    }


def test_latents_of_the_tiny_encoder_are_about_normal(tiny_repo):
    from simpletuner.networks.effnet import MINIATURE, EfficientNetEncoder

    encoder = EfficientNetEncoder(MINIATURE).eval()
    encoder.load_state_dict(load_file(tiny_repo("stable_cascade") / "stable-cascade" / "effnet_encoder.safetensors"))
    pictures = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6) * 2 - 1, size=(192, 192), mode="bilinear")
    with torch.no_grad():
        std = encoder(pictures).std((0, 2, 3))
    assert 0.5 < std.median() < 2


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny_repo, tmp_path):
    before = torch.random.get_rng_state()
    build_model("sana", tmp_path / "again")
    build_model("sana", tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in (tiny_repo("sana"), tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_its_scheduler_is_the_shipped_one(tiny_repo):
    config = json.loads((tiny_repo("sana") / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DPMSolverMultistepScheduler"
    assert (config["flow_shift"], config["prediction_type"], config["use_flow_sigmas"]) == (3.0, "flow_prediction", True)


def test_gemmas_tokenizer_puts_bos_first_and_pads_to_the_right(tiny_repo):
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo("sana") / "tokenizer")
    ids = tokenizer("a cat", padding="max_length", max_length=8).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "a", "▁cat", *["<pad>"] * 5]
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]


@pytest.fixture(scope="module")
def gemma(tiny_repo):
    return AutoTokenizer.from_pretrained(tiny_repo("sana") / "tokenizer")


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40).filter(lambda text: not any(special in text for special in ("<", "▁"))))
def test_any_text_comes_back_from_its_tokens(gemma, text):
    ids = gemma(text).input_ids
    assert gemma.unk_token_id not in ids
    assert gemma.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_an_unknown_family_is_told_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"`sanna`(.|\n)*choose from: sana"):
        build_model("sanna", tmp_path / "new")


def test_a_folder_in_use_is_not_written_into(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(UserError, match="not empty"):
        build_model("sana", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
