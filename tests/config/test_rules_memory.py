"""Rules and notices of memory and kernels."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.rules_memory import savings
from simpletuner.config.run import Hardware
from simpletuner.errors import ConfigError

Project = Any

V100 = Hardware("cuda", capability=(7, 0))
H100 = Hardware("cuda", has_bf16=True, capability=(9, 0))
OFFLOAD = "enable_group_offload=true"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model_type=full",), "full tuning"),
        (("gradient_checkpointing=false",), "not every block is recomputed"),
        (("gradient_checkpointing_interval=2",), "not every block is recomputed"),
        (("dynamo_backend=eager",), "bound to the place"),
        (("group_offload_type=leaf_level",), "all layers of a block at once"),
    ],
)
def test_offload_is_refused_where_it_would_save_nothing_or_break(project: Project, words: tuple[str, ...], said: str) -> None:
    assert said in project.problem(OFFLOAD, *words)


def test_offload_of_a_frozen_base_that_is_recomputed_passes(project: Project) -> None:
    run = project.run(OFFLOAD, "group_offload_blocks_per_group=2", hardware=H100)
    assert run.memory.enable_group_offload
    assert not any("saves nothing" in line for line in run.notices)


def refused(project: Project, hardware: Hardware, *words: str) -> str:
    project.parse(*words)  # a wish that another machine could fulfil is no mistake in writing
    with pytest.raises(ConfigError) as caught:
        project.run(*words, hardware=hardware)
    return str(caught.value)


def test_dora_is_not_compiled(project: Project) -> None:
    assert "breaks each block" in project.problem("dynamo_backend=inductor", "use_dora=true")


def test_inductor_without_a_compiler_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.run("dynamo_backend=inductor").kernels.dynamo_backend == "inductor"
    monkeypatch.setenv("PATH", "")
    assert "there is no C++ compiler" in refused(project, H100, "dynamo_backend=inductor")
    assert project.run("dynamo_backend=aot_eager").kernels.dynamo_backend == "aot_eager"


def test_cuda_graphs_need_cuda(project: Project) -> None:
    assert "records CUDA's calls" in refused(project, Hardware(), "dynamo_backend=cudagraphs")
    assert project.run("dynamo_backend=cudagraphs", hardware=H100).kernels.dynamo_backend == "cudagraphs"


@pytest.mark.parametrize(
    ("written", "environ"),
    [("dynamo_backend=INDUCTOR", {}), ("--TRAINING_DYNAMO_BACKEND=inductor", {}), ("--dynamo_backend=Inductor", {})],
)
def test_the_compiler_is_named_as_accelerate_users_write_it(project: Project, written: str, environ: dict[str, str]) -> None:
    assert project.run(written, environ=environ).kernels.dynamo_backend == "inductor"


@pytest.mark.parametrize(
    ("words", "hardware", "said"),
    [
        (("offload_during_startup=true",), Hardware(), "`offload_during_startup` saves nothing here"),
        ((OFFLOAD,), Hardware(), "`enable_group_offload` saves nothing here"),
        ((OFFLOAD, "group_offload_use_stream=true"), Hardware("mps"), "streams are CUDA's"),
        (("disable_tf32=true",), Hardware(), "no TF32"),
        (("disable_tf32=true",), V100, "no TF32"),
    ],
)
def test_what_changes_nothing_on_this_machine_is_told(
    project: Project, words: tuple[str, ...], hardware: Hardware, said: str
) -> None:
    assert any(said in line for line in project.run(*words, hardware=hardware).notices)


def test_what_changes_something_is_not(project: Project) -> None:
    words = ("offload_during_startup=true", OFFLOAD, "group_offload_use_stream=true", "disable_tf32=true")
    notices = project.run(*words, hardware=H100).notices
    assert not any("here" in line for line in notices), notices


def test_a_familys_own_notices_are_told(project: Project) -> None:
    assert "That is strong." in project.run("fake_strength=3").notices


def test_only_savings_that_are_still_to_be_had_are_named(project: Project) -> None:
    frugal = ("base_model_precision=nf4-bnb", OFFLOAD, "offload_during_startup=true", "vae_enable_tiling=true")
    assert list(savings(project.run(*frugal))) == [
        "take smaller pictures (resolution, validation_resolution) or fewer at once (vae_batch_size)"
    ]
    lavish = "; ".join(savings(project.run("train_batch_size=4", "gradient_checkpointing_interval=2")))
    for name in ("train_batch_size", "gradient_checkpointing_interval", "base_model_precision", "enable_group_offload"):
        assert name in lavish
    full = "; ".join(savings(project.run("model_type=full")))
    assert "base_model_precision" not in full
    assert 'model_type "lora"' in full


def test_a_sets_own_batch_and_encoders_that_stay_are_named(project: Project) -> None:
    project.dataset(train_batch_size=8, vae_cache_ondemand=True)
    told = "; ".join(savings(project.run()))
    assert "lower train_batch_size" in told
    assert "no encoder stays beside it (vae_cache_ondemand false)" in told


def test_tiles_are_no_saving_where_the_family_has_none(project: Project) -> None:
    assert "vae_enable_tiling" in "; ".join(savings(project.run()))
    assert "vae_enable_tiling" not in "; ".join(savings(project.run("model_family=other")))
