"""Stage C's files: adapters that come back as they went, their other names, and the whole pipeline of a full tuning."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableCascadePriorPipeline
from diffusers.models import StableCascadeUNet
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.data.samples import Prompt
from simpletuner.errors import UserError
from simpletuner.families.cascade_lora import export_comfyui
from simpletuner.families.stable_cascade import StableCascade, load_decoder_pipeline, load_stage_c_lora
from simpletuner.training.tuning import build_tuning


def trained(family: StableCascade):
    """A denoiser with a tuning that has moved."""
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, family.run)
    torch.manual_seed(1)
    for parameter in tuning.parameters().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return denoiser, tuning


def inputs(family: StableCascade):
    [encoder] = family.text_encoders()
    with encoder.lent("cpu") as encode:
        cond = family.collate(encode([Prompt("a cat")]), [])
    return torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([0.6]), cond


@pytest.fixture
def adapter(make_run, tmp_path):
    """(family, its trained answer, the base's answer, the saved file)."""
    family = StableCascade(make_run("stable_cascade", lora_rank=3, lora_alpha=6.0))
    denoiser, tuning = trained(family)
    x, t, cond = inputs(family)
    with torch.no_grad(), tuning.evaluating():
        answer = family.predict(denoiser, x, t, cond)
        with tuning.disabled():
            base = family.predict(denoiser, x, t, cond)
    return family, answer, base, tuning.save_result(tmp_path / "result")


@pytest.fixture
def pipeline(tiny_repo):
    return StableCascadePriorPipeline.from_pretrained(tiny_repo("stable_cascade") / "stable-cascade-prior")


def test_keys_begin_with_the_component_and_the_config_lies_beside(adapter):
    *_, file = adapter
    assert all(
        re.fullmatch(r"prior\.(down|up)_blocks\.\d\.\d+\.attention\..*\.lora_[AB]\.weight", key) for key in load_file(file)
    )
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (config["prior.r"], config["prior.lora_alpha"]) == (3, 6.0)


@pytest.mark.parametrize("form", ["file", "folder", "unet prefix"])
def test_a_saved_lora_loaded_into_the_stock_pipeline_gives_identical_predictions(adapter, pipeline, form, tmp_path):
    family, answer, _, file = adapter
    path = {"folder": file.parent}.get(form, file)
    if form == "unet prefix":
        path = tmp_path / "older.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = {"lora_adapter_metadata": opened.metadata()["lora_adapter_metadata"].replace('"prior.', '"unet.')}
        save_file({key.replace("prior.", "unet.", 1): tensor for key, tensor in load_file(file).items()}, path, metadata)
    load_stage_c_lora(pipeline, path)
    x, t, cond = inputs(family)
    with torch.no_grad():
        assert torch.equal(family.predict(pipeline.prior, x, t, cond), answer)
    assert not any(
        parameter.requires_grad or module.training for module in pipeline.prior.modules() for parameter in module.parameters()
    )


def test_the_scale_blends_between_base_and_adapter(adapter, tiny_repo):
    family, answer, base, file = adapter
    answers = {}
    for scale in (0.0, 0.5, 1.0):
        pipeline = StableCascadePriorPipeline.from_pretrained(tiny_repo("stable_cascade") / "stable-cascade-prior")
        load_stage_c_lora(pipeline, file, scale)
        with torch.no_grad():
            answers[scale] = family.predict(pipeline.prior, *inputs(family))
    assert torch.equal(answers[0.0], base)
    assert torch.equal(answers[1.0], answer)
    assert 0 < (answers[0.5] - base).norm() < (answer - base).norm()


def test_a_lora_of_another_prior_is_refused(adapter, make_run, pipeline, tmp_path):
    lite = StableCascade(make_run("stable_cascade", model_flavour="stage-c-lite", lora_rank=2))
    file = build_tuning(lite, lite.load_denoiser(), lite.run).save_result(tmp_path / "lite")
    *_, big = adapter
    load_stage_c_lora(SimpleNamespace(prior=lite.load_denoiser()), file)
    pipeline.prior = lite.load_denoiser()
    with pytest.raises(UserError, match="does not fit this prior"):
        load_stage_c_lora(pipeline, big)
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match="is not a LoRA of this model"):
        load_stage_c_lora(pipeline, tmp_path / "sd3.safetensors")
    load_stage_c_lora(pipeline, file)  # what was refused left no trace


def test_a_second_lora_is_refused(adapter, pipeline):
    load_stage_c_lora(pipeline, adapter[-1])
    with pytest.raises(ValueError, match="holds a LoRA already"):
        load_stage_c_lora(pipeline, adapter[-1])


def test_the_comfyui_export_maps_back_key_by_key(adapter, tmp_path):
    """Back by the rule read from the other side: every attention layer of the model, its path as ComfyUI has it."""
    family, *_, file = adapter
    export_comfyui(file, tmp_path / "comfy.safetensors")
    exported, ours = load_file(tmp_path / "comfy.safetensors"), load_file(file)
    back = {}
    for name, _ in family.load_denoiser().named_modules():
        match = re.fullmatch(r"(.*)\.attention\.(to_q|to_k|to_v|to_out\.0)", name)
        if not match:
            continue
        theirs = "out_proj" if match[2] == "to_out.0" else match[2]
        stem = f"lora_prior_unet_{match[1].replace('.', '_')}_attention_attn_{theirs}"
        assert exported.pop(f"{stem}.alpha").item() == 6
        for side, matrix in (("down", "lora_A"), ("up", "lora_B")):
            back[f"prior.{name}.{matrix}.weight"] = exported.pop(f"{stem}.lora_{side}.weight")
    assert not exported
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_a_dora_is_known_by_its_tensors_where_its_config_is_lost(make_run, pipeline, tmp_path):
    family = StableCascade(make_run("stable_cascade", lora_rank=3, lora_alpha=3.0, use_dora=True))
    denoiser, tuning = trained(family)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tuning.save_result(tmp_path / "result")), bare)
    with pytest.raises(UserError, match="is a DoRA"):
        export_comfyui(bare, tmp_path / "comfy.safetensors")
    load_stage_c_lora(pipeline, bare)
    x, t, cond = inputs(family)
    with torch.no_grad(), tuning.evaluating():
        torch.testing.assert_close(family.predict(pipeline.prior, x, t, cond), family.predict(denoiser, x, t, cond))


def test_a_dora_of_convolutions_too_comes_back_as_it_went(make_run, pipeline, tmp_path):
    """Lengths of a convolution's rows have four dimensions."""
    family = StableCascade(make_run("stable_cascade", lora_rank=3, use_dora=True, lora_target_preset="full"))
    denoiser, tuning = trained(family)
    load_stage_c_lora(pipeline, tuning.save_result(tmp_path / "result"))
    x, t, cond = inputs(family)
    with torch.no_grad(), tuning.evaluating():
        assert torch.equal(family.predict(pipeline.prior, x, t, cond), family.predict(denoiser, x, t, cond))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (".to_q.lora_B.weight", None, "is not whole"),
        (".to_q.lora_A.weight", ".to_q.lora_down.weight", "does not fit this prior"),
        (".attention.to_q.lora_A.weight", ".lora_A.weight", "does not fit this prior"),
    ],
    ids=["half of a pair", "another layout's name", "a block, no layer"],
)
def test_tensors_that_would_be_passed_over_are_refused(adapter, pipeline, tmp_path, old, new, told):
    weights = load_file(adapter[-1])
    name = next(name for name in weights if name.endswith(old))
    tensor = weights.pop(name)
    if new:
        weights[name.replace(old, new)] = tensor
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=told):
        load_stage_c_lora(pipeline, tmp_path / "odd.safetensors")


def test_an_export_never_overwrites(adapter, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is there already"):
        export_comfyui(adapter[-1], tmp_path / "there.safetensors")


@pytest.mark.parametrize("flavour", ["stage-c", "stage-c-lite"])
def test_a_full_tuning_is_a_pipeline_that_loads_and_trains_on(make_run, tmp_path, flavour):
    family = StableCascade(make_run("stable_cascade", model_type="full", model_flavour=flavour))
    denoiser, tuning = trained(family)
    result = tuning.save_result(tmp_path)
    x, t, cond = inputs(family)
    with torch.no_grad(), tuning.evaluating():
        answer = family.predict(denoiser, x, t, cond)
    pipeline = StableCascadePriorPipeline.from_pretrained(result)
    again = StableCascade(make_run("stable_cascade", pretrained_model_name_or_path=str(result)))
    again.verify()
    same = make_run("stable_cascade", model_flavour="stage-c-lite", pretrained_model_name_or_path=str(result))
    with pytest.raises(UserError, match=r"has no `prior_lite`[\s\S]*leave \"model_flavour\" out"):
        StableCascade(same).verify()
    with torch.no_grad():
        assert torch.equal(family.predict(pipeline.prior, x, t, cond), answer)
        assert torch.equal(again.predict(again.load_denoiser(), x, t, cond), answer)
    assert isinstance(pipeline.prior, StableCascadeUNet)


@pytest.mark.parametrize(("model_type", "flavour"), [("lora", "stage-c"), ("lora", "stage-c-lite"), ("full", "stage-c")])
def test_the_closing_lines_of_python_make_a_picture(make_run, tmp_path, monkeypatch, model_type, flavour):
    monkeypatch.chdir(tmp_path)
    family = StableCascade(make_run("stable_cascade", model_type=model_type, model_flavour=flavour, lora_rank=2))
    _, tuning = trained(family)
    lines = family.usage(tuning.save_result(Path("run")), 'a "red" cat')
    assert "height=1024, width=1024" in lines
    with contextlib.redirect_stderr(io.StringIO()):
        exec(lines.replace("1024", "256"), {})
    assert Image.open("picture.png").size == (256, 256)


def test_the_closing_lines_name_the_decoder_of_the_gallery_and_find_it(make_run, tiny_repo, tmp_path, monkeypatch):
    """A folder of one's own, relative to where one stands, whose weights are of a variant."""
    monkeypatch.chdir(tmp_path)
    own = shutil.copytree(tiny_repo("stable_cascade") / "stable-cascade" / "decoder_lite", tmp_path / "mine" / "b")
    own.joinpath("diffusion_pytorch_model.safetensors").rename(own / "diffusion_pytorch_model.bf16.safetensors")
    options = {"stable_cascade_decoder_subfolder": "mine/b", "stable_cascade_decoder_variant": "bf16"}
    family = StableCascade(make_run("stable_cascade", **options))
    [line] = [line for line in family.usage(Path("pipeline"), "a cat").splitlines() if line.startswith("decoder = ")]
    found = {}
    exec(line, {"load_decoder_pipeline": load_decoder_pipeline}, found)
    weights, expected = found["decoder"].decoder.network.state_dict(), load_file(family.decoder.weights[0])
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_folder_that_happens_to_be_called_decoder_is_not_taken_for_the_repositorys(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text("{}")
    family = StableCascade(make_run("stable_cascade"))
    assert not any(tmp_path in path.parents for path in family.decoder.weights)
