"""Which of SD3's denoisers a configuration or a single file holds, and loading one from a single file.

Such a file is in the layout in which it was published (`model.diffusion_model.joint_blocks...`) or in diffusers' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.errors import UserError
from simpletuner.families.common import quiet
from simpletuner.families.repository import verify_file

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Shape", "load_single_file", "verify_single_file"]

BLOCK = re.compile(r"(?:model\.diffusion_model\.)?(?:joint_blocks|transformer_blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Shape:
    """What tells SD3's denoisers apart."""

    blocks: int
    dual_blocks: int
    """Blocks that attend to the picture a second time."""
    has_norms: bool
    """Whether queries and keys are normalised."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Shape:
        """Of a transformer's `config.json`; those of SD3.0 are older than two of the settings."""
        dual_blocks = len(config.get("dual_attention_layers") or ())
        return cls(config["num_layers"], dual_blocks, config.get("qk_norm") is not None)

    @classmethod
    def of_file(cls, path: Path) -> Shape:
        """Of a safetensors file, by the names of its tensors."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            found = [(int(match[1]), match[2]) for name in file.keys() if (match := BLOCK.fullmatch(name))]  # noqa: SIM118
        return cls(
            blocks=len({block for block, _ in found}),
            dual_blocks=len({block for block, part in found if "attn2." in part}),
            has_norms=any(part.endswith(("attn.ln_q.weight", "attn.norm_q.weight")) for _, part in found),
        )

    @property
    def model(self) -> str:
        """The published model of this kind."""
        if not self.has_norms:
            return "SD3.0"
        return "SD3.5-medium" if self.dual_blocks else "SD3.5-large"

    def __str__(self) -> str:
        return f"{self.model} ({self.blocks} blocks)"


def verify_single_file(path: Path, config: Mapping[str, Any], repository: str) -> None:
    """Raises UserError unless the file is whole and holds a transformer of the kind that `repository` has."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"`pretrained_transformer_model_name_or_path` is `{path}`, which is no safetensors file.",
            why="weights in other formats are not loaded, since loading them can run code.",
            mend="name one `.safetensors` file; a whole repository goes into `pretrained_model_name_or_path`.",
        )
    verify_file(path)
    if stray := stray_tensors(path):
        raise UserError(
            f"`{path}` stores its weights in few bits: it holds `{stray[0]}`.",
            why="the scales that belong to such weights would be left out, and the model would be another one.",
            mend='fetch the file in fp16 or bf16; "base_model_precision" stores it in fewer bits here.',
        )
    found, wanted = Shape.of_file(path), Shape.of_config(config)
    if found != wanted:
        what = f"holds the transformer of {found}" if found.blocks else "holds no SD3 transformer"
        raise UserError(
            f"`{path}` {what}, but `{repository}` is {wanted}.",
            why="text encoders, autoencoder and the transformer's configuration come from the repository.",
            mend='set "pretrained_model_name_or_path" or "model_flavour" to the model that the file belongs to.',
        )


def stray_tensors(path: Path) -> list[str]:
    """Names of a block's tensors that are neither weight nor bias: what quantised files keep beside them."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if BLOCK.fullmatch(name)]  # noqa: SIM118
    return sorted(name for name in names if not name.endswith((".weight", ".bias")))


def load_single_file(path: Path, config_file: Path, dtype: str) -> nn.Module:
    """The transformer of a single file, by the `config.json` of its repository; in eval mode. Raises UserError."""
    import torch
    from diffusers import SD3Transformer2DModel

    try:
        with quiet():
            denoiser: Any = SD3Transformer2DModel.from_single_file(
                str(path), config=str(config_file.parent), torch_dtype=getattr(torch, dtype), local_files_only=True
            )
    except (KeyError, ValueError, NotImplementedError) as error:  # the last: a weight that is missing stayed on `meta`
        raise UserError(
            f"The transformer in `{path}` cannot be loaded: {error}",
            why=f"it does not fit `{config_file}`, or a weight is missing.",
            mend="fetch the file again, or name the repository of the model that it belongs to.",
        ) from error
    return denoiser.eval()
