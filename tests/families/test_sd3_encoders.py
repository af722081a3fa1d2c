"""SD3's encoders against the stock pipeline: prompts, latents, and what of them is in memory together."""

from __future__ import annotations

import gc

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from simpletuner.data.prompts import PromptStore
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Prompt, draw_seed
from simpletuner.families.sd3 import StableDiffusion3
from tests.families.sd3_stock import BF16, PROMPTS, TOKENS, encoded


@pytest.fixture(scope="module")
def stock(tiny_repo) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_repo("sd3"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sd3(make_run) -> StableDiffusion3:
    return StableDiffusion3(make_run("sd3"))


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
    sizes = [sum(weight.nbytes for weight in encoder.load("cpu").parameters()) for encoder in encoders]
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
        picture = decode(latents, {}, {})
    assert picture.size == (128, 96)
    assert picture.tobytes() == expected.tobytes()


def test_a_picture_of_more_than_512_px_is_encoded_in_tiles_where_that_is_asked_for(make_run, sd3):
    column = torch.linspace(-1, 1, 640).view(1, 1, 1, -1).expand(1, 3, 32, -1)
    family = StableDiffusion3(make_run("sd3", vae_enable_tiling=True))
    with sd3.image_encoder().lent("cpu") as encode, family.image_encoder().lent("cpu") as encode_tiled:
        whole, tiled = encode(column, ["aa"]), encode_tiled(column, ["aa"])
        assert torch.equal(encode_tiled(column[..., :512], ["aa"]), encode(column[..., :512], ["aa"]))
    assert tiled.shape == whole.shape == (1, 16, 4, 80)
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.2 * whole.std(), "each tile is normalised by itself"
    assert family.image_encoder().recipe.digest != sd3.image_encoder().recipe.digest


def test_one_picture_at_a_time_gives_the_same_latents_under_the_same_recipe(make_run, sd3):
    pixels = torch.rand(3, 3, 32, 64) * 2 - 1
    family, batches = StableDiffusion3(make_run("sd3", vae_enable_slicing=True)), []
    encoder = family.image_encoder()
    vae = encoder.load()
    vae.encoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    keys = ["aa", "bb", "cc"]
    with sd3.image_encoder().lent("cpu") as encode:
        torch.testing.assert_close(encoder.encode(vae, pixels, keys, "cpu"), encode(pixels, keys), atol=1e-5, rtol=1e-5)
    assert batches == [1, 1, 1]
    assert encoder.recipe == sd3.image_encoder().recipe


def test_offloaded_encoders_give_the_same(make_run, sd3):
    family = StableDiffusion3(make_run("sd3", offload_during_startup=True))
    prompts, pixels = [Prompt("a cat"), Prompt("", "uncond")], torch.rand(1, 3, 32, 64) * 2 - 1
    for ours, theirs in zip(encoded(family, prompts), encoded(sd3, prompts), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with family.image_encoder().lent("cpu") as offloaded, sd3.image_encoder().lent("cpu") as encode:
        assert torch.equal(offloaded(pixels, ["aa"]), encode(pixels, ["aa"]))
