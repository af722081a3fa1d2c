"""What is wrong with the attention kernels that a run asks for: for its family, on this machine, or with what is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from simpletuner.config.catalogue import ATTENTION, AttentionRow
from simpletuner.config.run import Hardware, Run
from simpletuner.config.vocabulary import FamilyFacts
from simpletuner.errors import Problem, missing

__all__ = ["check_family", "check_hardware", "notices", "unfit_heads"]

OPTION = "attention_mechanism"
HALF = ("float16", "bfloat16")
AMPERE = (8, 0)
CUDA_ATTENTION = ("native-efficient", "cudnn")
"""Attention kernels of PyTorch that only CUDA has; flash and the plain one are on the CPU too."""
MEND = 'Set it to "diffusers", which takes the best kernel that PyTorch has.'


def check_family(run: Run, family: FamilyFacts) -> Iterator[Problem]:
    """Packages' kernels for a family that cannot use them."""
    mechanism = run.kernels.attention_mechanism
    if mechanism in ATTENTION and family.keeps_attention:
        what = f'`{OPTION}` is "{mechanism}", which {family.title} cannot use.'
        yield Problem(OPTION, what, family.keeps_attention, MEND)


def unfit_heads(mechanism: str, width: int, model: str) -> Problem | None:
    """The problem that the kernels of this name cannot serve attention heads of this width."""
    row = ATTENTION.get(mechanism)
    if row is None or width in row.head_widths:
        return None
    what = f'`{OPTION}` is "{mechanism}", but the attention heads of `{model}` are {width} wide.'
    return Problem(OPTION, what, f"its kernels are for widths of {row.widths}.", MEND)


def check_hardware(run: Run) -> Iterator[Problem]:
    """Kernels that this machine does not have."""
    mechanism = run.kernels.attention_mechanism
    if mechanism == "diffusers":
        return
    row = ATTENTION.get(mechanism)
    if why := _lacks_kernel(run) if row is None else _unfit(row, run):
        where = run.hardware.name or run.hardware.device
        yield Problem(OPTION, f'`{OPTION}` is "{mechanism}", which this run cannot use on {where}.', why, MEND)
    elif row is not None:
        yield from _not_installed(mechanism, row)


def _lacks_kernel(run: Run) -> str:
    """Why PyTorch's kernel is not to be had; "" if it is."""
    mechanism, hardware = run.kernels.attention_mechanism, run.hardware
    if hardware.device != "cuda":
        if mechanism in CUDA_ATTENTION:
            return "only CUDA has that kernel."
        return "Apple's GPUs have one kernel, their own." if hardware.device == "mps" and mechanism == "native-flash" else ""
    if mechanism == "cudnn" and hardware.capability is None:
        return "cuDNN is NVIDIA's."
    if mechanism in ("native-flash", "cudnn"):
        if hardware.capability is not None and hardware.capability < AMPERE:
            return "that kernel begins with NVIDIA's Ampere cards (compute capability 8.0)."
        return _too_precise(run)
    return ""


def _too_precise(run: Run) -> str:
    """Why attention is not computed in half precision; "" if it is."""
    if run.dtypes.base in HALF or run.dtypes.autocast is not None:
        return ""
    return f"that kernel computes in bf16 and fp16 only, and this run in {run.dtypes.base}."


def _unfit(row: AttentionRow, run: Run) -> str:
    """Why a package's kernels do not run here; "" if they do, once it is installed."""
    hardware: Hardware = run.hardware
    if hardware.device != "cuda":
        return "its kernels are CUDA's."
    if hardware.capability is None:
        return _too_precise(run) if row.on_amd else "its kernels are for NVIDIA's cards."
    if hardware.capability < row.capability or (row.below is not None and hardware.capability >= row.below):
        needs, below, has = (".".join(map(str, pair or ())) for pair in (row.capability, row.below, hardware.capability))
        limit = f" and less than {below}" if below else " or more"
        return f"it needs compute capability {needs}{limit}; this card has {has}."
    return _too_precise(run)


def _not_installed(mechanism: str, row: AttentionRow) -> Iterator[Problem]:
    """A package that is not there, or too old: looked up, not imported."""
    if problem := missing(row.module, option=f"{OPTION}={mechanism}", pip=row.pip):
        yield problem
        return
    try:
        found = version(row.module)
    except PackageNotFoundError:  # a folder on the path that nobody installed
        found = "0"
    if row.version and tuple(map(int, re.findall(r"\d+", found)[: len(row.version)])) < row.version:
        wanted = ".".join(map(str, row.version))
        what = f"`{OPTION}={mechanism}` needs `{row.module}` {wanted} or newer; {found} is installed."
        yield Problem(OPTION, what, "diffusers calls functions that older ones lack.", row.pip)


def notices(run: Run) -> Iterator[str]:
    """What packages' kernels are not used for."""
    mechanism = run.kernels.attention_mechanism
    if row := ATTENTION.get(mechanism):
        yield f"{OPTION} {mechanism} paints the gallery only, and training takes PyTorch's own kernels: {row.not_trained}"
