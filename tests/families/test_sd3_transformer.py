"""A transformer from a single file: what it becomes, and which files are refused."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from simpletuner.errors import UserError
from simpletuner.families.sd3 import StableDiffusion3
from tests.families.sd3_stock import BF16, VARIANTS


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


def test_the_snippet_for_an_adapter_takes_the_transformer_from_the_file(make_run, tiny_repo, files, tmp_path):
    file = files / "sd3.safetensors"
    family = StableDiffusion3(make_run("sd3", pretrained_transformer_model_name_or_path=str(file)))
    lines = family.usage(tmp_path / "pytorch_lora_weights.safetensors", "a cat").splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines[:2]), names)
    weight = names["pipeline"].transformer.norm_out.linear.weight
    base = load_file(tiny_repo("sd3") / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(weight, base["norm_out.linear.weight"] + 1)


def test_the_snippet_for_a_lycoris_adapter_takes_the_transformer_from_the_file_too(make_run, files, tmp_path):
    adapter = {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr", "multiplier": 0.5}}
    options = {"pretrained_transformer_model_name_or_path": str(files / "sd3.safetensors"), **adapter}
    said = StableDiffusion3(make_run("sd3", **options)).usage(tmp_path / "pytorch_lora_weights.safetensors", "a cat")
    assert "transformer=SD3Transformer2DModel.from_single_file(" in said
    assert "create_lycoris_from_weights(0.5, " in said


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


@pytest.mark.parametrize(
    "beside", ["joint_blocks.1.x_block.mlp.fc1.scale_weight", "joint_blocks.1.x_block.mlp.fc1.weight.absmax"]
)
def test_a_quantised_file_is_refused_since_its_scales_would_be_left_out(make_run, files, tmp_path, beside):
    weights = load_file(files / "sd3.safetensors")
    weights[f"model.diffusion_model.{beside}"] = torch.ones(1)
    save_file(weights, tmp_path / "scaled.safetensors")
    run = make_run("sd3", pretrained_transformer_model_name_or_path=str(tmp_path / "scaled.safetensors"))
    with pytest.raises(UserError, match=rf"in few bits: it holds `model.diffusion_model.{beside}`"):
        StableDiffusion3(run).verify()


def test_a_file_of_the_right_kind_that_lacks_a_weight_is_told(make_run, files, tmp_path):
    weights = load_file(files / "sd3.safetensors")
    del weights["model.diffusion_model.joint_blocks.2.x_block.mlp.fc1.bias"]
    save_file(weights, tmp_path / "lacking.safetensors")
    run = make_run("sd3", pretrained_transformer_model_name_or_path=str(tmp_path / "lacking.safetensors"))
    with pytest.raises(UserError, match=r"cannot be loaded: .*joint_blocks.2.x_block.mlp.fc1.bias"):
        StableDiffusion3(run).load_denoiser()
