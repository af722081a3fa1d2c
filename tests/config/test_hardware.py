from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.hardware import has_kernels, missing_kernels
from simpletuner.config.run import Hardware

Project = Any

CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_124 = CUDA_126
CUDA_128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CUDA_130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120")
V100, T4, A100, RTX_3090, RTX_4090, H100, B200, RTX_5090 = (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("card", "build", "runs"),
    [
        (V100, CUDA_126, True),
        (V100, CUDA_130, False),
        (T4, CUDA_130, True),
        (A100, CUDA_130, True),
        (RTX_3090, CUDA_130, True),
        (RTX_4090, CUDA_130, True),  # by 8.6's code
        (H100, CUDA_126, True),
        (B200, CUDA_124, False),
        (RTX_5090, CUDA_126, False),
        (RTX_5090, CUDA_128, True),
        (RTX_5090, ("sm_90", "compute_90"), True),
        (B200, ("sm_100a",), True),
        ((10, 3), ("sm_100a",), False),
        ((10, 3), ("sm_100f",), True),
        (RTX_5090, ("sm_100f",), False),
        ((8, 0), ("sm_86",), False),
        (V100, ("gfx942",), False),
    ],
)
def test_code_runs_on_its_own_major_version_from_its_minor_one_on(
    card: tuple[int, int], build: tuple[str, ...], runs: bool
) -> None:
    assert has_kernels(card, build) == runs


def hardware(capability: tuple[int, int] | None, build: tuple[str, ...], version: str, name: str = "") -> Hardware:
    return Hardware("cuda", has_bf16=True, capability=capability, built_for=build, cuda_version=version, name=name)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (hardware(V100, CUDA_130, "13.0", "Tesla V100"), ("Tesla V100 (Volta, compute capability 7.0)", "/whl/cu126")),
        (hardware(RTX_5090, CUDA_124, "12.4"), ("(Blackwell, compute capability 12.0)", "/whl/cu130")),
        (hardware((6, 1), CUDA_128, "12.8"), ("Pascal", "/whl/cu126")),
    ],
)
def test_a_card_without_kernels_gets_the_pip_line_that_fits_it(
    project: Project, machine: Hardware, words: tuple[str, ...]
) -> None:
    [problem] = missing_kernels(machine)
    assert all(word in str(problem) for word in words)
    assert f"CUDA {machine.cuda_version}" in problem.why
    project.parse()  # what is written is right
    with pytest.raises(Exception, match="no kernels for"):
        project.run(hardware=machine)


@pytest.mark.parametrize("machine", [Hardware(), Hardware("mps"), Hardware("cuda"), hardware(V100, CUDA_126, "12.6")])
def test_a_machine_that_can_compute_has_no_problem(machine: Hardware) -> None:
    assert not list(missing_kernels(machine))
