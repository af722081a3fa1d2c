"""Networks without weights, on torch's meta device, from a repository's small JSON files: to count what they would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from simpletuner.families import common
from simpletuner.families.repository import Repository

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["hollow", "hollow_or_whole", "token_ids", "zeros"]


def hollow(model_class: Any, repository: Repository, subfolder: str, dtype: str) -> nn.Module:
    """A diffusers or transformers model in eval mode whose weights have shapes and formats, and no numbers.

    Reads `config.json` of the component and nothing else. Raises UserError.
    """
    import torch

    config = repository.json(f"{subfolder}/config.json")
    with torch.device("meta"):
        if model_class.__module__.startswith("transformers."):
            from transformers import AutoConfig

            settings = AutoConfig.from_pretrained(repository.file(f"{subfolder}/config.json").parent, local_files_only=True)
            build = getattr(model_class, "from_config", model_class)  # AutoModel looks the class up
            model = build(settings)
        else:
            model = model_class.from_config(config)
    for part in (*model.parameters(), *model.buffers()):  # not `model.to`: diffusers warns of it
        if part.is_floating_point():
            part.data = part.data.to(getattr(torch, dtype))
    return model.to("meta").eval()


def hollow_or_whole(model_class: Any, repository: Repository, subfolder: str, dtype: str, *, is_hollow: bool) -> nn.Module:
    """The one, or the model with its weights on the CPU. Raises UserError."""
    if is_hollow:
        return hollow(model_class, repository, subfolder, dtype)
    return common.load_whole(model_class, repository.weights(subfolder), dtype)


def zeros(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Tensor]:
    """Tensors of zeros, in the format that torch calls `dtype`."""
    import torch

    return {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()}


def token_ids(size: int, tokens: int) -> Tensor:
    """The ids of `size` texts of so many tokens, (size, tokens)."""
    import torch

    return torch.zeros(size, tokens, dtype=torch.long)
