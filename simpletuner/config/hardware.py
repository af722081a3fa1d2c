"""Whether the installed torch has kernels for the card that is there, as a pure function of what both say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

from simpletuner.config.run import Hardware
from simpletuner.errors import Problem

__all__ = ["has_kernels", "missing_kernels"]

OLD_CARDS, NEW_CARDS = "cu126", "cu130"
"""Builds of torch: the last CUDA whose wheels hold Maxwell, Pascal and Volta, and one that holds Turing to Blackwell."""
TURING = (7, 5)

GENERATIONS = {
    (5, 0): "Maxwell", (6, 0): "Pascal", (7, 0): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 9): "Ada",
    (9, 0): "Hopper", (10, 0): "Blackwell",
}  # fmt: skip
"""First compute capability of each."""


def missing_kernels(hardware: Hardware) -> Iterator[Problem]:
    """What is wrong if this torch cannot compute on this card: it would be found at the first kernel, after the downloads."""
    if hardware.capability is None or not hardware.built_for or has_kernels(hardware.capability, hardware.built_for):
        return
    major, minor = hardware.capability
    card = f"{hardware.name or 'the card'} ({_generation(hardware.capability)}, compute capability {major}.{minor})"
    build = OLD_CARDS if hardware.capability < TURING else NEW_CARDS
    index = f"https://download.pytorch.org/whl/{build}"
    yield Problem(
        "",
        f"The installed PyTorch has no kernels for {card}.",
        f"it was built with CUDA {hardware.cuda_version} for: {', '.join(hardware.built_for)}.",
        f"pip install --force-reinstall torch --index-url {index}   (or train on the CPU: ACCELERATE_USE_CPU=1)",
    )


def has_kernels(capability: tuple[int, int], built_for: tuple[str, ...]) -> bool:
    """Whether one of `built_for` runs there.

    Machine code (`sm_86`) runs on cards of its major version from its minor one on; `sm_90a` on just that card; `sm_100f` on
    its family, which begins there. Code for later compilation (`compute_90`) runs on every card from there on.
    Source: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities" and "Application Compatibility".
    """
    for architecture in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        kind, own, exact = match[1], (int(match[2]), int(match[3])), match[4] == "a"
        if own == capability or (not exact and own <= capability and (kind == "compute" or own[0] == capability[0])):
            return True
    return False


def _generation(capability: tuple[int, int]) -> str:
    names = [name for first, name in GENERATIONS.items() if first <= capability]
    return names[-1] if names else "older than Maxwell"
