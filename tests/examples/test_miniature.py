"""The shipped miniature: whole, small, licensed, loaded by ours and by stock diffusers, and honest about what it never saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from torch import Tensor

from simpletuner import examples
from simpletuner.data.pixels import measure, read_pixels
from simpletuner.data.samples import Place, Prompt
from simpletuner.families.sana import Sana

PICTURES = sorted((examples.find("sana-emoji").parent / "fluent_emoji").iterdir())
RECIPE: dict[str, Any] = json.loads((examples.MINIATURE / "recipe.json").read_text())


@pytest.fixture
def miniature(make_run: Callable[..., Any]) -> Sana:
    return Sana(make_run("sana", pretrained_model_name_or_path=str(examples.MINIATURE)))


@pytest.fixture(scope="module")
def stock() -> SanaPipeline:
    pipeline = SanaPipeline.from_pretrained(examples.MINIATURE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(path: Path) -> Tensor:
    return read_pixels(path.read_bytes(), Place(measure(path), (64, 64), (0, 0), (64, 64)))


def test_all_of_it_stays_under_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in examples.MINIATURE.rglob("*") if path.is_file()) < 10_000_000


def test_sources_and_licences_lie_beside_the_weights() -> None:
    notice = (examples.MINIATURE / "NOTICE.md").read_text()
    assert "Apache License" in (examples.MINIATURE / "LICENSE").read_text()
    for source in ("Noto Emoji, Copyright Google", "Twemoji graphics, Copyright", "CC-BY 4.0", "Cal Henderson", "MIT"):
        assert source in notice


def test_the_recipe_names_the_examples_style_and_every_concept_of_it_as_held_out() -> None:
    nouns = {path.stem.removeprefix("a_3d_emoji_of_").replace("_", " ") for path in PICTURES}
    assert nouns <= set(RECIPE["held_out"]["concepts"].values())
    assert "fluent" in RECIPE["held_out"]["style"]


def test_its_grid_is_that_of_64_px_pictures(miniature: Sana) -> None:
    latent = miniature.latent
    assert (latent.native_edge_px, latent.cell_px, latent.alignment_px) == (64, 8, 8)


def test_the_autoencoder_returns_pictures_whose_style_it_never_saw(miniature: Sana) -> None:
    measured = RECIPE["measured"]["autoencoder_psnr_db"]
    pixels_B3HW = torch.stack([pixels(path) for path in PICTURES])
    autoencoder = miniature.image_encoder()
    with autoencoder.lent("cpu") as encode:
        latents_BCHW = encode(pixels_B3HW, [path.name for path in PICTURES])
    vae: Any = autoencoder.load()
    with torch.no_grad():
        answer_B3HW = vae.decode(latents_BCHW / vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)
    psnr_db_B = -10 * ((answer_B3HW - pixels_B3HW) / 2).square().mean((1, 2, 3)).log10()
    assert psnr_db_B.mean() > measured["mean"] - 0.5
    assert psnr_db_B.min() > measured["least"] - 1
    assert 0.8 < latents_BCHW.std().item() < 1.25, "the denoiser was trained on latents of spread 1"


def test_prompts_equal_the_stock_pipelines_and_the_instruction_costs_few_tokens(miniature: Sana, stock: SanaPipeline) -> None:
    [encoder] = miniature.text_encoders()
    with encoder.lent("cpu") as encode:
        [ours] = encode([Prompt("A 3D emoji of a red apple")])
    with torch.no_grad():
        theirs_BLD, mask_BL, _, _ = stock.encode_prompt(
            "A 3D emoji of a red apple", complex_human_instruction=encoder.instruction.split("\n")
        )
    assert torch.equal(ours["prompt_LD"], theirs_BLD[mask_BL.bool()])
    assert len(encoder.tokenizer.encode(encoder.instruction)) < 20


def test_the_stock_pipeline_draws_what_it_was_trained_on_in_its_colours(stock: SanaPipeline) -> None:
    images: Any = stock(
        ["a noto emoji of a green apple", "a noto emoji of a pineapple"],
        height=64,
        width=64,
        num_inference_steps=12,
        use_resolution_binning=False,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    apple, pineapple = (1 - images).mean((1, 2))  # what white lacks, by channel: red, green, blue
    assert apple[1] < apple[0] - 0.05, "a green apple takes more red than green away"
    assert pineapple[2] > pineapple[0] + 0.05, "a yellow pineapple takes blue away"
