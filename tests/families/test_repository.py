"""Repositories as folders and on the hub: the same answers, and clear words when something is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.errors import UserError
from simpletuner.families.repository import Repository, fingerprint_file, variant_of, verify_file, without_variant

NAME = "some-studio/tiny-sana"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_repo, tmp_path) -> Path:
    """A tiny Sana that may be spoiled."""
    return shutil.copytree(tiny_repo("sana"), tmp_path / "copy")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a folder the hub repository `NAME`, as a download would have left it in the cache; there is no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def publish(folder: Path, revision: str = "main") -> Path:
        root = tmp_path / "hub" / "models--some-studio--tiny-sana"
        snapshot = root / "snapshots" / COMMIT
        for file in (path for path in folder.rglob("*") if path.is_file()):
            blob = root / "blobs" / str(abs(hash(file.relative_to(folder))))
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(COMMIT)
        return snapshot

    return publish


def rename_weights(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


# what it gives


def test_a_hub_repository_reads_like_the_folder_it_is_a_copy_of(tiny_repo, hub):
    snapshot = hub(tiny_repo("sana"))
    local, remote = Repository(str(tiny_repo("sana"))), Repository(NAME)
    assert (local.is_local, remote.is_local) == (True, False)
    assert remote.json("vae/config.json") == local.json("vae/config.json")
    assert remote.weights("transformer").folder == snapshot / "transformer"
    for component in ("text_encoder", "tokenizer", "vae"):
        assert remote.fingerprint(component) == local.fingerprint(component)


def test_a_revision_of_the_hub_is_obeyed(tiny_repo, hub):
    hub(tiny_repo("sana"), revision="v2")
    assert Repository(NAME, revision="v2").json("model_index.json")["_class_name"] == "SanaPipeline"
    with pytest.raises(UserError, match="the hub cannot be reached"):
        Repository(NAME, revision="v1").json("model_index.json")


def test_a_folder_wins_over_a_hub_repository_of_its_name(tiny_repo, hub, tmp_path, monkeypatch):
    hub(tiny_repo("sana"))
    (tmp_path / NAME / "vae").mkdir(parents=True)
    (tmp_path / NAME / "vae" / "config.json").write_text('{"here": true}')
    monkeypatch.chdir(tmp_path)
    assert Repository(NAME).json("vae/config.json") == {"here": True}


def test_the_fingerprint_follows_the_content_not_the_place(tiny_repo, copy):
    before = Repository(str(tiny_repo("sana"))).fingerprint("vae")
    assert Repository(str(copy)).fingerprint("vae") == before


@pytest.mark.parametrize("position", [0, -1])
def test_the_fingerprint_changes_with_any_tensor(copy, position):
    repository = Repository(str(copy))
    file = copy / "vae" / WEIGHTS
    weights = load_file(file)
    for name in list(weights)[:3]:
        before = repository.fingerprint("vae")
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[position] += 1
        save_file(changed, file)
        assert repository.fingerprint("vae") != before
        save_file(weights, file)


def test_the_fingerprint_changes_with_a_tokenizers_vocabulary(copy):
    before = Repository(str(copy)).fingerprint("tokenizer")
    file = copy / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("▁cat", "▁cow"))
    assert Repository(str(copy)).fingerprint("tokenizer") != before


def test_a_variant_is_taken_where_there_is_one_and_plain_weights_elsewhere(copy):
    shutil.copyfile(copy / "vae" / WEIGHTS, copy / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    repository = Repository(str(copy), variant="fp16")
    assert [path.name for path in repository.component("vae").weights] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert [path.name for path in repository.component("transformer").weights] == [WEIGHTS]
    assert [path.name for path in Repository(str(copy)).component("vae").weights] == [WEIGHTS]


@pytest.mark.parametrize(
    ("name", "variant", "plain"),
    [
        ("model.safetensors", None, "model.safetensors"),
        ("model-00001-of-00002.safetensors", None, "model-00001-of-00002.safetensors"),
        ("model.fp16.safetensors", "fp16", "model.safetensors"),
        ("model.bf16-00001-of-00002.safetensors", "bf16", "model-00001-of-00002.safetensors"),
        ("model.safetensors.index.bf16.json", "bf16", "model.safetensors.index.json"),
        ("model.safetensors.index.json", None, "model.safetensors.index.json"),
        ("tokenizer_config.json", None, "tokenizer_config.json"),
    ],
)
def test_the_variant_in_a_files_name(name, variant, plain):
    assert variant_of(name) == variant
    assert without_variant(name) == plain


# copies


def test_a_copy_leaves_one_component_out_and_loses_the_variant(copy, tmp_path):
    weights = load_file(copy / "vae" / WEIGHTS)
    names = sorted(weights)
    shards = {"diffusion_pytorch_model.bf16-00001-of-00002.safetensors": names[:5]}
    shards["diffusion_pytorch_model.bf16-00002-of-00002.safetensors"] = names[5:]
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, copy / "vae" / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (copy / "vae" / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text(json.dumps(index))
    save_file({name: torch.zeros(1) for name in names}, copy / "vae" / WEIGHTS)  # what the variant stands in for

    Repository(str(copy), variant="bf16").copy(tmp_path / "out", but="transformer")

    from diffusers import AutoencoderDC

    vae = AutoencoderDC.from_pretrained(tmp_path / "out" / "vae")
    assert all(torch.equal(vae.state_dict()[name], weights[name]) for name in names)
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"model_index.json", "scheduler", "text_encoder", "tokenizer", "vae"}


def test_a_copy_of_a_hub_repository_holds_files_not_links(tiny_repo, hub, tmp_path):
    hub(tiny_repo("sana"))
    Repository(NAME).copy(tmp_path / "out", but="transformer")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 6
    assert not any(path.is_symlink() for path in files)


def test_a_single_file_is_found_or_is_none_in_a_folder_and_on_the_hub(tiny_repo, hub, tmp_path):
    folder = shutil.copytree(tiny_repo("sana"), tmp_path / "with file")
    (folder / "extra.safetensors").write_bytes(b"content")
    snapshot = hub(folder)
    assert Repository(str(folder)).find("extra.safetensors") == folder / "extra.safetensors"
    assert Repository(NAME).find("extra.safetensors") == snapshot / "extra.safetensors"
    assert Repository(str(folder)).find("other.safetensors") is None
    with pytest.raises(UserError, match="the hub cannot be reached"):  # offline, nobody knows whether it is there
        Repository(NAME).find("other.safetensors")


def test_a_files_fingerprint_is_its_contents_not_its_names(tiny_repo, tmp_path):
    source = tiny_repo("stable_cascade") / "stable-cascade" / "previewer.safetensors"
    copied = shutil.copyfile(source, tmp_path / "other name.safetensors")
    assert fingerprint_file(copied) == fingerprint_file(source)
    raw = bytearray(copied.read_bytes())
    raw[-1] ^= 1
    copied.write_bytes(raw)
    assert fingerprint_file(copied) != fingerprint_file(source)


# what may be wrong


def test_a_missing_folder_is_told_with_the_place_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="The model folder `models/sana/here` is missing") as caught:
        Repository("models/sana/here")
    assert f"`{tmp_path}/models/sana/here`" in str(caught.value)


def test_a_name_that_may_be_the_hubs_is_told_with_both_places(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hub cannot be reached") as caught:
        Repository("models/sana").json("model_index.json")
    assert f"`{tmp_path}/models/sana`" in str(caught.value)


def test_a_folder_without_an_index_is_told(copy):
    with pytest.raises(UserError, match=r"holds no `model_index.json`"):
        Repository(str(copy / "transformer")).expect("SanaPipeline", family="sana")


def test_another_familys_pipeline_is_named(copy):
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("SanaPipeline", "StableDiffusion3Pipeline"))
    with pytest.raises(UserError, match="holds a StableDiffusion3Pipeline, but model_family is `sana`"):
        Repository(str(copy)).expect("SanaPipeline", family="sana")


def test_a_missing_component_is_named(copy):
    shutil.rmtree(copy / "vae")
    with pytest.raises(UserError, match="no component `vae`"):
        Repository(str(copy)).weights("vae")


def test_weights_in_another_variant_only_are_told(copy):
    rename_weights(copy / "vae", WEIGHTS, "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(UserError, match=r"without a variant in `vae`(.|\n)*bf16"):
        Repository(str(copy)).weights("vae")
    with pytest.raises(UserError, match=r"of the variant `fp16` in `vae`(.|\n)*bf16"):
        Repository(str(copy), variant="fp16").weights("vae")


def test_pickled_weights_are_not_weights(copy):
    rename_weights(copy / "vae", WEIGHTS, "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="loading them can run code"):
        Repository(str(copy)).weights("vae")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9999\n", "git lfs pull"),
        (b"<!DOCTYPE html><title>Sign in</title>", "fetch it again"),
        (b"\x02\0\0\0\0\0\0\0[]", "fetch it again"),
        (b'\x07\0\0\0\0\0\0\0{"a":1}', "fetch it again"),
    ],
    ids=["pointer", "page", "list", "number"],
)
def test_what_is_no_weights_at_all_is_told_without_reading_ahead(tmp_path, content, told):
    """Text read as a length asks for more memory than there is."""
    file = tmp_path / "effnet.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"is not a whole safetensors file[\s\S]*{told}"):
        verify_file(file)


def test_weights_without_a_configuration_are_told(copy):
    (copy / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"transformer` has no `config\.json`"):
        Repository(str(copy)).verify("transformer")


@pytest.mark.parametrize("kept_bytes", [4, 200, -100])
def test_a_torn_weight_file_is_named(copy, kept_bytes):
    file = copy / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match=f"{WEIGHTS}` is not a whole safetensors file"):
        Repository(str(copy)).fingerprint("vae")


def test_broken_json_is_told_with_its_place(copy):
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"vae/config.json"):
        Repository(str(copy)).json("vae/config.json")
