"""Rules and notices of attention kernels, PyTorch's and those of packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from typing import Any, get_args

import pytest

from simpletuner.config import rules_attention
from simpletuner.config.catalogue import ATTENTION
from simpletuner.config.run import Hardware
from simpletuner.config.sections import Kernels
from simpletuner.errors import ConfigError

Project = Any

V100 = Hardware("cuda", capability=(7, 0))
A100 = Hardware("cuda", has_bf16=True, capability=(8, 0))
H100 = Hardware("cuda", has_bf16=True, capability=(9, 0))
B200 = Hardware("cuda", has_bf16=True, capability=(10, 0))
AMD = Hardware("cuda", has_bf16=True)


def refused(project: Project, hardware: Hardware, *words: str) -> str:
    project.parse(*words)  # a wish that another machine could fulfil is no mistake in writing
    with pytest.raises(ConfigError) as caught:
        project.run(*words, hardware=hardware)
    return str(caught.value)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Module -> version of the packages that are to be found, as the test wishes."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None) if name in versions else None)
    monkeypatch.setattr(rules_attention, "version", version)
    return versions


@pytest.mark.parametrize(
    ("mechanism", "hardware", "mixed", "why"),
    [
        ("native-efficient", Hardware(), "no", "only CUDA"),
        ("cudnn", Hardware("mps"), "no", "only CUDA"),
        ("native-flash", Hardware("mps"), "no", "one kernel"),
        ("cudnn", AMD, "bf16", "NVIDIA's"),
        ("native-flash", V100, "fp16", "Ampere"),
        ("native-flash", H100, "no", "in float32"),
        ("cudnn", H100, "no", "in float32"),
    ],
)
def test_an_attention_kernel_that_is_not_there_is_refused(
    project: Project, mechanism: str, hardware: Hardware, mixed: str, why: str
) -> None:
    words = (f"attention_mechanism={mechanism}", f"mixed_precision={mixed}")
    assert why in refused(project, hardware, *words)


@pytest.mark.parametrize(
    ("mechanism", "hardware", "mixed"),
    [
        ("native-flash", Hardware(), "no"),
        ("native-math", Hardware("mps"), "no"),
        ("native-flash", H100, "bf16"),
        ("cudnn", H100, "bf16"),
        ("native-flash", AMD, "bf16"),
        ("native-efficient", V100, "no"),
    ],
)
def test_one_that_is_there_passes(project: Project, mechanism: str, hardware: Hardware, mixed: str) -> None:
    run = project.run(f"attention_mechanism={mechanism}", f"mixed_precision={mixed}", hardware=hardware)
    assert run.kernels.attention_mechanism == mechanism


def test_every_package_is_a_choice_of_the_option() -> None:
    choices = get_args(Kernels.model_fields["attention_mechanism"].annotation)
    assert [name for name in choices if name in ATTENTION] == list(ATTENTION)


@pytest.mark.parametrize(
    ("mechanism", "hardware", "mixed", "why"),
    [
        ("sageattention", Hardware(), "no", "its kernels are CUDA's"),
        ("flash-attn", Hardware("mps"), "no", "its kernels are CUDA's"),
        ("sageattention", AMD, "bf16", "NVIDIA's cards"),
        ("flash-attn", AMD, "no", "in float32"),
        ("sageattention-int8-fp16-triton", V100, "fp16", "compute capability 8.0 or more; this card has 7.0"),
        ("sageattention-int8-fp8-cuda", A100, "bf16", "compute capability 8.9 or more; this card has 8.0"),
        ("flash-attn-3", A100, "bf16", "compute capability 9.0 and less than 10.0; this card has 8.0"),
        ("flash-attn-3", B200, "bf16", "this card has 10.0"),
        ("sageattention", H100, "no", "in float32"),
    ],
)
def test_a_packages_kernels_are_refused_where_they_cannot_run(
    project: Project, installed: dict[str, str], mechanism: str, hardware: Hardware, mixed: str, why: str
) -> None:
    installed.update({row.module: "99.0" for row in ATTENTION.values()})
    assert why in refused(project, hardware, f"attention_mechanism={mechanism}", f"mixed_precision={mixed}")


@pytest.mark.parametrize("mechanism", ATTENTION)
def test_a_package_that_is_not_there_is_told_with_its_pip_line(
    project: Project, installed: dict[str, str], mechanism: str
) -> None:
    said = refused(project, H100, f"attention_mechanism={mechanism}")
    assert f"`attention_mechanism={mechanism}` needs the package `{ATTENTION[mechanism].module}`" in said
    assert f"Mend: {ATTENTION[mechanism].pip}" in said


@pytest.mark.parametrize("found", ["1.0.6", "2.1.0", None])
def test_a_package_that_is_too_old_for_diffusers_is_told(
    project: Project, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    if found is None:  # a folder of that name without an installation
        monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    else:
        installed["sageattention"] = found
    said = refused(project, H100, "attention_mechanism=sageattention")
    assert f"`sageattention` 2.1.1 or newer; {found or '0'} is installed" in said


@pytest.mark.parametrize(
    ("mechanism", "hardware", "version"),
    [
        ("sageattention", A100, "2.2.0+cu130torch2.13"),
        ("sageattention-int8-fp8-cuda", H100, "2.1.1"),
        ("flash-attn", AMD, "2.8.3"),
        ("flash-attn", B200, "2.10"),
        ("flash-attn-3", H100, "3.0.0b1"),
    ],
)
def test_one_that_fits_passes_and_the_user_hears_what_it_is_for(
    project: Project, installed: dict[str, str], mechanism: str, hardware: Hardware, version: str
) -> None:
    installed[ATTENTION[mechanism].module] = version
    run = project.run(f"attention_mechanism={mechanism}", hardware=hardware)
    assert any(f"attention_mechanism {mechanism} paints the gallery only" in line for line in run.notices)


def test_a_family_that_cannot_use_them_says_why_on_any_machine(project: Project) -> None:
    project.config({"model_family": "other", "attention_mechanism": "sageattention"})
    with pytest.raises(ConfigError, match=r'"sageattention", which Other cannot use\.\nWhy:  its heads are odd\.'):
        project.parse()
    project.config({"model_family": "other", "attention_mechanism": "native-math"})
    assert project.run().kernels.attention_mechanism == "native-math"


@pytest.mark.parametrize(
    ("mechanism", "width", "fits"),
    [("sageattention", 64, True), ("sageattention", 112, False), ("flash-attn", 112, True), ("flash-attn", 36, False),
     ("flash-attn-3", 256, True), ("flash-attn", 264, False), ("diffusers", 3, True), ("cudnn", 3, True)],
)  # fmt: skip
def test_the_width_of_heads_decides(mechanism: str, width: int, fits: bool) -> None:
    assert (rules_attention.unfit_heads(mechanism, width, "a model") is None) == fits


def test_looking_for_the_packages_imports_none(tmp_path: Any) -> None:
    for name in ("sageattention", "flash_attn"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from simpletuner.config import rules_attention as rules\n"
        "print([len(list(rules._not_installed(name, rules.ATTENTION[name]))) for name in ('sageattention', 'flash-attn')])\n"
        "print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[1, 1]", "[]"]
