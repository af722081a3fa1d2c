"""What every family keeps, over the listing of the folder: a new file there is held to all of it.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import simpletuner
from simpletuner.config.datasets import ImageDataset
from simpletuner.config.run import Dtypes
from simpletuner.config.sections import SECTIONS, Objective
from simpletuner.data.cache import TensorCache
from simpletuner.data.samples import Cond, Embeds, Place, Prompt
from simpletuner.diffusion.objective import l2, sample_loss
from simpletuner.errors import UserError
from simpletuner.examples.tiny import model_options
from simpletuner.families import find
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.training.tuning import build_tuning

BF16 = Dtypes(base="bfloat16", trained="float32", autocast=None, text="bfloat16", latents="float16")
PROMPTS = [Prompt("A red Cat "), Prompt("two dogs", "uncond"), Prompt("", "uncond"), Prompt("犬 " * 500)]

pytestmark = pytest.mark.parametrize("name", find())


@pytest.fixture
def family(name, make_run) -> ModelFamily:
    return find()[name](make_run(name))


def encode(family: ModelFamily) -> list[Embeds]:
    """The embeds of PROMPTS, those of all text encoders together."""
    merged: list[Embeds] = [{} for _ in PROMPTS]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode_prompts:
            for embeds, more in zip(merged, encode_prompts(PROMPTS), strict=True):
                embeds.update(more)
    return merged


def native_batch(family: ModelFamily) -> tuple[Tensor, Tensor, Cond]:
    """Two noisy latents of the native size, their times and conditions."""
    edge = family.latent.native_edge_px
    place = Place((edge, edge), (edge, edge), (0, 0), (edge, edge))
    rows, columns = family.latent.grid(edge, edge)
    x_BCHW = torch.randn(2, family.latent.channels, rows, columns, generator=torch.Generator().manual_seed(0))
    return x_BCHW, torch.tensor([0.3, 0.8]), family.collate(encode(family)[:2], [place, place])


def shot(family: ModelFamily, **changes: Any) -> Shot:
    edge = family.latent.native_edge_px
    return replace(Shot("main", 0, "a cat", "", edge, edge, seed=3, guidance=family.shot_defaults()[0], steps=2), **changes)


# facts of the class


def test_importing_the_family_loads_no_torch(name):
    script = f"import sys, simpletuner.families as f; f.find()['{name}'].Options; print([m for m in HEAVY if m in sys.modules])"
    script = script.replace("HEAVY", "('torch', 'diffusers', 'transformers', 'huggingface_hub', 'numpy')")
    root = Path(simpletuner.__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_its_defaults_are_options_and_fit_them(name):
    family = find()[name]
    for key, value in family.defaults.items():
        homes = [section for section in (*SECTIONS.values(), family.Options, ImageDataset) if key in section.model_fields]
        assert len(homes) == 1, key
        required = {"model_family": name} if homes[0] is SECTIONS["model"] else {}
        required |= {"id": "a", "instance_data_dir": "b"} if homes[0] is ImageDataset else {}
        assert getattr(homes[0](**{key: value, **required}), key) == value


def test_its_own_options_are_new_and_explained(name):
    for key, field in find()[name].Options.model_fields.items():
        assert not any(key in section.model_fields for section in SECTIONS.values()), key
        assert field.description, key


def test_its_default_flavour_is_one_of_its_flavours(name):
    family = find()[name]
    assert family.default_flavour in family.flavours
    assert all(flavour.native_edge_px % 64 == 0 for flavour in family.flavours.values())


# preprocessing


def test_embeds_survive_the_cache(family, tmp_path):
    embeds, back = encode(family), [Embeds() for _ in PROMPTS]
    keys = [f"{number:032x}" for number in range(len(PROMPTS))]
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode_prompts, TensorCache(tmp_path, encoder.recipe).writer(2) as writer:
            writer.add(list(zip(keys, encode_prompts(PROMPTS), strict=True)))
        for merged, key in zip(back, keys, strict=True):
            part = TensorCache(tmp_path, encoder.recipe).get(key)
            assert not merged.keys() & part.keys()
            merged.update(part)
    place = Place((128, 128), (128, 128), (0, 0), (128, 128))
    cond, again = (family.collate(each, [place] * len(keys)) for each in (embeds, back))
    assert cond.keys() == again.keys()
    assert all(torch.equal(cond[key], again[key]) and cond[key].dtype == again[key].dtype for key in cond)
    assert all(len(tensor) == len(keys) for tensor in cond.values())


def test_its_recipes_tell_one_model_from_another(name, make_run, tmp_path):
    from simpletuner.examples.tiny import build_model, model_options

    build_model(name, tmp_path / "other", seed=1)
    digests = set()
    for options in ({}, model_options(name, tmp_path / "other")):
        family = find()[name](make_run(name, **options))
        digests |= {encoder.recipe.digest for encoder in (*family.text_encoders(), family.image_encoder())}
    assert len(digests) == 2 * (1 + len(family.text_encoders()))


def test_latents_have_the_grid_that_the_family_says_and_decode_to_their_size(family):
    spec = family.latent
    width, height = spec.native_edge_px, spec.native_edge_px - spec.alignment_px
    with family.image_encoder().lent("cpu") as encode_pixels:
        latents = encode_pixels(torch.zeros(2, 3, height, width), ["00", "01"])
    assert latents.shape == (2, spec.channels, *spec.grid(width, height))
    assert (latents.dtype, latents.device.type) == (torch.float32, "cpu")
    with family.image_decoder("cpu") as decode:
        picture = decode(latents[:1], *encode(family)[:2])
    assert (picture.size, picture.mode) == ((width, height), "RGB")


# training


def test_every_weight_of_the_denoiser_is_the_files(name, family, tiny_repo):
    weights = family.load_denoiser().state_dict()
    assert weights
    held = [load_file(file) for file in tiny_repo(name).rglob("*.safetensors")]
    [own] = [
        file for file in held if file.keys() == weights.keys() and all(file[k].shape == w.shape for k, w in weights.items())
    ]
    assert all(torch.equal(weight, own[key]) for key, weight in weights.items())


def test_the_denoiser_comes_in_eval_mode_on_the_cpu(family):
    denoiser = family.load_denoiser()
    assert not any(module.training for module in denoiser.modules())
    assert {weight.device.type for weight in denoiser.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtypes", [{}, {"dtypes": BF16}], ids=["fp32", "bf16"])
def test_it_answers_in_the_shape_of_x(name, make_run, dtypes):
    family = find()[name](make_run(name, **dtypes))
    x_BCHW, t_B, cond = native_batch(family)
    answer_BCHW = family.predict(family.load_denoiser(), x_BCHW, t_B, cond)
    assert answer_BCHW.shape == x_BCHW.shape
    assert torch.isfinite(answer_BCHW).all()


def test_each_sample_is_answered_for_itself(family):
    x_BCHW, t_B, cond = native_batch(family)
    denoiser = family.load_denoiser()
    with torch.no_grad():
        both = family.predict(denoiser, x_BCHW, t_B, cond)
        for place in (0, 1):
            alone = {key: tensor[place : place + 1] for key, tensor in cond.items()}
            one = family.predict(denoiser, x_BCHW[place : place + 1], t_B[place : place + 1], alone)
            torch.testing.assert_close(one[0], both[place], atol=1e-4, rtol=1e-4)


def test_prompt_and_time_are_heard(family):
    x_BCHW, t_B, cond = native_batch(family)
    denoiser = family.load_denoiser()
    swapped = {key: tensor.flip(0) for key, tensor in cond.items()}
    with torch.no_grad():
        answer = family.predict(denoiser, x_BCHW, t_B, cond)
        assert not torch.allclose(family.predict(denoiser, x_BCHW, t_B.flip(0), cond), answer, atol=1e-3)
        assert not torch.allclose(family.predict(denoiser, x_BCHW, t_B, swapped), answer, atol=1e-4)


def test_gradients_reach_the_adapter_and_nothing_else(family):
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, family.run)
    x_BCHW, t_B, cond = native_batch(family)
    l2(family.predict(denoiser, x_BCHW, t_B, cond), torch.zeros_like(x_BCHW)).mean().backward()
    trained = {id(parameter) for parameter in tuning.parameters().values()}
    for key, parameter in denoiser.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), key
    assert all(parameter.grad.abs().sum() > 0 for key, parameter in tuning.parameters().items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("model_type", "dtypes"), [("lora", BF16), ("full", replace(BF16, base="float32", autocast="bfloat16"))]
)
def test_forward_and_backward_never_wait_for_the_device(name, make_run, monkeypatch, model_type, dtypes):
    """On `meta`, which holds no values: reading one raises, and so does a tensor that was left on the CPU."""
    on_cpu = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _, *args, **options: on_cpu("cpu", *args, **options))  # knows no `meta`
    family = find()[name](make_run(name, dtypes=dtypes, model_type=model_type, gradient_checkpointing=True))
    x_BCHW, t_B, cond = native_batch(family)
    denoiser = family.load_denoiser().to("meta")
    tuning = build_tuning(family, denoiser, family.run)
    x_BCHW, t_B = x_BCHW.to("meta"), t_B.to("meta")
    noisy_BCHW = family.process.diffuse(x_BCHW, x_BCHW, t_B)
    with torch.autocast("meta", getattr(torch, dtypes.autocast or "bfloat16"), enabled=dtypes.autocast is not None):
        answer_BCHW = family.predict(denoiser, noisy_BCHW, t_B, {key: part.to("meta") for key, part in cond.items()})
    target_BCHW, flow_time_B = family.process.target(x_BCHW, x_BCHW, t_B), family.process.flow_time(t_B)
    for objective in (Objective(), Objective(loss_type="huber", huber_schedule="snr")):
        loss_B = sample_loss(objective, answer_BCHW, target_BCHW, t_B=t_B, flow_time_B=flow_time_B)
        loss_B.mean().backward(retain_graph=True)
    assert all(parameter.grad is not None for parameter in tuning.parameters().values())


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_saved_weights_answer_as_they_did(name, make_run, tmp_path, model_type):
    family = find()[name](make_run(name, model_type=model_type, lora_rank=2))
    x_BCHW, t_B, cond = native_batch(family)
    answers = []
    for is_new in (True, False):
        denoiser = family.load_denoiser()
        tuning = build_tuning(family, denoiser, family.run)
        if is_new:
            torch.manual_seed(1)
            for parameter in tuning.parameters().values():
                parameter.data += 0.02 * torch.randn_like(parameter)
            tuning.save(tmp_path)
        else:
            tuning.load(tuning.read(tmp_path))
        with torch.no_grad(), tuning.evaluating():
            answers.append(family.predict(denoiser, x_BCHW, t_B, cond))
        if model_type == "lora":
            with torch.no_grad(), tuning.disabled():
                answers.append(family.predict(denoiser, x_BCHW, t_B, cond))
    with torch.no_grad():
        base = family.predict(family.load_denoiser(), x_BCHW, t_B, cond)
    new, again = (answers[0], answers[2]) if model_type == "lora" else answers
    assert torch.equal(new, again)
    assert not torch.allclose(new, base, atol=1e-3)
    if model_type == "lora":
        assert torch.equal(answers[1], base)
        assert torch.equal(answers[3], base)


def test_times_rise_with_u_for_every_size(family):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for latent_HW in ((2, 2), (16, 8)):
        t = family.density(latent_HW)(u)
        assert torch.all((t > 0) & (t < 1))
        assert torch.all(t.diff() > 0)


def test_flow_time_is_noises_share_of_signal_and_noise_by_amplitude(family):
    """Read off the process itself: diffused with and without noise."""
    t_B = family.density((16, 16))(torch.linspace(0.02, 0.98, 9, dtype=torch.float64))
    one, zero = torch.ones(9, 1, 1, 1, dtype=torch.float64), torch.zeros(9, 1, 1, 1, dtype=torch.float64)
    noise, signal = family.process.diffuse(zero, one, t_B), family.process.diffuse(one, zero, t_B)
    torch.testing.assert_close(family.process.flow_time(t_B), (noise / (noise + signal)).flatten(), atol=1e-7, rtol=1e-6)


# the gallery


def test_a_shot_is_sampled_and_decoded_and_its_seed_decides(family):
    cond, uncond = encode(family)[:2]
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        first, again, other = (sample(shot(family, seed=seed), cond, uncond, None) for seed in (3, 3, 4))
    edge = family.latent.native_edge_px
    assert first.shape == (1, family.latent.channels, *family.latent.grid(edge, edge))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    with family.image_decoder("cpu") as decode:
        assert decode(first, cond, uncond).size == (edge, edge)


def test_every_step_of_a_shot_is_told_and_can_be_shown(family):
    told = []
    asked = shot(family, steps=3)
    embeds = encode(family)
    with torch.no_grad(), family.preview_decoder("cpu") as show, family.sampler(family.load_denoiser(), "cpu") as sample:
        last = sample(asked, embeds[0], embeds[1], lambda done, latents: told.append((done, latents.clone(), show(latents))))
    assert [done for done, _, _ in told] == list(range(1, family.sampler_steps(asked) + 1))
    assert torch.equal(told[-1][1].float(), last.float())
    assert {picture.size for _, _, picture in told} == {(asked.width_px, asked.height_px)}
    assert len({picture.tobytes() for _, _, picture in told}) == len(told)


def test_a_half_precision_base_paints_with_its_float32_adapter(name, make_run):
    family = find()[name](make_run(name, dtypes=BF16, lora_rank=2))
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, family.run)
    cond, uncond = encode(family)[:2]
    painted = []
    for strength in (0.0, 0.3):
        for parameter in tuning.parameters().values():
            parameter.data.fill_(strength)
        with family.sampler(denoiser, "cpu") as sample:
            painted.append(sample(shot(family), cond, uncond, None))
    assert all(torch.isfinite(latents).all() and latents.dtype == torch.float32 for latents in painted)
    assert not torch.allclose(*painted, atol=0.05)


def test_guidance_at_1_asks_nothing_of_the_negative_prompt(family):
    cond, uncond, empty, _ = encode(family)
    with family.sampler(family.load_denoiser(), "cpu") as sample:
        plain = [sample(shot(family, guidance=1.0), cond, negative, None) for negative in (uncond, empty)]
        led = [sample(shot(family, guidance=4.0), cond, negative, None) for negative in (uncond, empty)]
    assert torch.equal(*plain)
    assert not torch.allclose(*led, atol=1e-4)
    assert not torch.allclose(plain[0], led[0], atol=1e-3)


class Oracle(nn.Module):
    """Stands in for a denoiser and answers the process's own target for one clean latent, whatever the noise."""

    def __init__(self, family: ModelFamily, denoiser: Any, x0_1CHW: Tensor) -> None:
        super().__init__()
        self.config = denoiser.config
        self.weight = nn.Parameter(torch.zeros(1))  # pipelines ask a model for its format and device
        self.process = family.process
        self.x0_1CHW = x0_1CHW
        self.times: list[float] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, hidden_states: Tensor | None = None, **told: Any) -> tuple[Tensor]:
        """Flow families hear `hidden_states` and thousandths; Stable Cascade `sample` and the time itself."""
        hidden_states = told["sample"] if hidden_states is None else hidden_states
        t_B = told["timestep"].float() / 1000 if "timestep" in told else told["timestep_ratio"]
        self.times.append(t_B[0].item())
        x0_BCHW = self.x0_1CHW.expand_as(hidden_states)
        return (self.process.target(x0_BCHW, self.process.noise(hidden_states, x0_BCHW, t_B), t_B),)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_pipeline_returns_the_latent_that_an_oracle_knows(family, guidance):
    """Reversed time, a wrong sign, scale or shift between training and sampling would end elsewhere."""
    edge = family.latent.native_edge_px
    x0_1CHW = torch.randn(
        1, family.latent.channels, *family.latent.grid(edge, edge), generator=torch.Generator().manual_seed(9)
    )
    oracle = Oracle(family, family.load_denoiser(), x0_1CHW)
    with family.sampler(oracle, "cpu") as sample:
        latents = sample(shot(family, guidance=guidance, steps=20), *encode(family)[:2], None)
    # Not exact: the shipped scheduler rounds the times that it tells to whole thousandths.
    torch.testing.assert_close(latents, x0_1CHW, atol=0.02, rtol=0)
    assert len(oracle.times) == 20
    assert oracle.times == sorted(oracle.times, reverse=True)
    assert 0.9 < oracle.times[0] <= 1


def test_the_oracle_is_what_training_asks_for(family):
    """The same oracle, asked through `predict`, must answer the training target: one convention for both."""
    x0_BCHW, t_B, cond = native_batch(family)
    noise_BCHW = torch.randn_like(x0_BCHW)
    oracle = Oracle(family, family.load_denoiser(), x0_BCHW)
    answer = family.predict(oracle, family.process.diffuse(x0_BCHW, noise_BCHW, t_B), t_B, cond)
    torch.testing.assert_close(answer, family.process.target(x0_BCHW, noise_BCHW, t_B), atol=1e-4, rtol=1e-4)


def test_a_missing_scheduler_is_told_at_start_where_there_is_a_gallery(name, make_run, tiny_repo, tmp_path):
    copy = shutil.copytree(tiny_repo(name), tmp_path / name)
    for folder in list(copy.rglob("scheduler")):
        shutil.rmtree(folder)
    options = model_options(name, copy)
    find()[name](make_run(name, **options)).verify()
    with pytest.raises(UserError, match="scheduler_config"):
        find()[name](make_run(name, validation_prompt="a cat", **options)).verify()
