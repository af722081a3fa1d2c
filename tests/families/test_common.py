"""What families share: alignment, loans, and files of adapters and weights."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.errors import UserError
from simpletuner.families import common, find
from simpletuner.families.repository import Repository


@pytest.mark.parametrize(
    ("native_edge_px", "cell_px", "alignment_px"),
    [(1024, 32, 64), (512, 16, 64), (2048, 32, 64), (128, 32, 32), (256, 32, 32), (64, 8, 8), (100, 8, 16), (1024, 128, 128)],
)
def test_buckets_align_to_64_px_or_finer_for_a_miniature(native_edge_px, cell_px, alignment_px):
    assert common.alignment_px(native_edge_px, cell_px) == alignment_px


# loading


def test_a_missing_weight_is_an_error_not_a_random_number(tiny_repo, tmp_path):
    from diffusers import AutoencoderDC

    folder = shutil.copytree(tiny_repo("sana"), tmp_path / "copy")
    file = folder / "vae" / common.COMPONENT_FILE
    weights = load_file(file)
    lost = sorted(weights)[3]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 weights of AutoencoderDC are missing(.|\n)*{lost}"):
        common.load_whole(AutoencoderDC, Repository(str(folder)).weights("vae"), "float32")


def test_a_torn_weight_file_is_told_with_its_folder(tiny_repo, tmp_path):
    from diffusers import AutoencoderDC

    folder = shutil.copytree(tiny_repo("sana"), tmp_path / "copy")
    file = folder / "vae" / common.COMPONENT_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        common.load_whole(AutoencoderDC, Repository(str(folder)).weights("vae"), "float32")
    assert str(folder / "vae") in str(caught.value)


def test_loading_prints_no_progress_bars_and_leaves_the_libraries_switches_alone(tiny_repo, capfd):
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers import AutoModel

    switches = of_diffusers.is_progress_bar_enabled, of_transformers.is_progress_bar_enabled, are_progress_bars_disabled
    before = [switch() for switch in switches]
    common.load_whole(AutoModel, Repository(str(tiny_repo("sana"))).weights("text_encoder"), "bfloat16")
    assert [switch() for switch in switches] == before
    assert capfd.readouterr() == ("", "")


def test_a_model_on_loan_is_loaded_once_at_the_first_call_and_gone_after_the_block():
    loads = []

    def load() -> torch.nn.Module:
        model = torch.nn.Linear(2, 2)
        model.itself = [model]  # a reference cycle, as real models have them
        loads.append(weakref.ref(model))
        return model

    with common.on_loan(load, "cpu") as model:
        assert not loads
        assert model() is model()
        assert not model().weight.requires_grad
        assert len(loads) == 1
    assert loads[0]() is None


def test_eval_mode_is_undone_module_by_module():
    frozen, trained = torch.nn.Dropout().eval(), torch.nn.Dropout()
    model = torch.nn.Sequential(frozen, trained)
    with common.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert (model.training, frozen.training, trained.training) == (True, False, True)


# adapters


WEIGHTS = {
    "blocks.0.to_q.lora_A.weight": torch.arange(6.0).view(2, 3),
    "blocks.0.to_q.lora_B.weight": torch.zeros(3, 2, dtype=torch.bfloat16),
}
CONFIG = {"r": 2, "lora_alpha": 8, "target_modules": {"to_q", "to_k"}, "peft_type": "LORA", "lora_dropout": 0.1}


def test_an_adapters_file_is_that_of_the_stock_pipeline(tmp_path):
    from diffusers import SanaPipeline

    ours = common.save_adapter(WEIGHTS, CONFIG, tmp_path / "ours", prefix="transformer")
    SanaPipeline.save_lora_weights(tmp_path / "stock", dict(WEIGHTS), transformer_lora_adapter_metadata=dict(CONFIG))
    contents = []
    for file in (ours, tmp_path / "stock" / ours.name):
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata())
            config = json.loads(metadata.pop("lora_adapter_metadata"))
            config["transformer.target_modules"].sort()
            contents.append((metadata, config, {name: opened.get_tensor(name) for name in sorted(opened.keys())}))
    assert contents[0][:2] == contents[1][:2]
    assert contents[0][2].keys() == contents[1][2].keys()
    assert all(torch.equal(tensor, contents[1][2][name]) for name, tensor in contents[0][2].items())


@pytest.mark.parametrize("named", ["file", "folder"])
def test_an_adapter_comes_back_without_its_prefix(tmp_path, named):
    file = common.save_adapter(WEIGHTS, CONFIG, tmp_path, prefix="transformer")
    back = common.load_adapter(file if named == "file" else tmp_path, prefixes=("other", "transformer"))
    assert back.keys() == WEIGHTS.keys()
    assert all(torch.equal(back[name], WEIGHTS[name]) and back[name].dtype == WEIGHTS[name].dtype for name in WEIGHTS)


def test_a_foreign_adapter_is_told_by_one_of_its_names(tmp_path):
    file = tmp_path / "kohya.safetensors"
    save_file({"lora_unet_down.lora_down.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"lora_unet_down.lora_down.weight"):
        common.load_adapter(file, prefixes=("transformer",))


def test_a_missing_adapter_is_told_with_its_place(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        common.load_adapter(tmp_path, prefixes=("transformer",))


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = common.write_safetensors({"a": torch.ones(2)}, tmp_path / "x.safetensors", {})
    with pytest.raises(AttributeError):
        common.write_safetensors({"a": None}, file, {})
    assert torch.equal(load_file(file)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [file]


def test_an_offloaded_model_keeps_its_weights_on_the_cpu_and_each_layer_visits(monkeypatch):
    """`meta` stands for the device: a visit moves a layer's weights there, as the calls that diffusers makes tell."""
    visited = []
    monkeypatch.setattr("diffusers.hooks.group_offloading.TorchDeviceBackend", lambda device: None)  # knows no `meta`
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: visited.append((group.onload_leader, group.onload_device.type)))
    monkeypatch.setattr("diffusers.hooks.group_offloading.send_to_device", lambda value, *_, **__: value)
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    with common.on_loan(lambda: network, "meta", is_offloaded=True) as model:
        model()(torch.zeros(1, 2))
        assert {weight.device.type for weight in model().parameters()} == {"cpu"}
    assert visited == [(network[0], "meta"), (network[1], "meta")]


# notices


@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_the_automatic_shift_is_told_with_what_it_replaces_and_what_the_gallery_has(make_run, family):
    def told(**options):
        return [line for line in find()[family].notices(make_run(family, **options)) if "shift" in line]

    assert not told(flow_schedule_shift=2.0)
    [own] = told(flow_schedule_auto_shift=True)
    assert "flow_schedule_shift 3 is not used. The gallery's is the scheduler's own" in own
    [given] = told(flow_schedule_auto_shift=True, validation_flow_shift=2.0)
    assert given.endswith("The gallery's is 2.")
