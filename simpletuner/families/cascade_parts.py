"""What Stable Cascade reads and writes besides its denoiser: prompts, latents, and the two networks that come as bare files.

Shape letters:  B batch,  C latent channels,  H W rows and columns,  L tokens,  D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.data.samples import Embeds, Prompt, Recipe
from simpletuner.errors import UserError
from simpletuner.families import common
from simpletuner.families.base import StateDict
from simpletuner.families.hollow import hollow, token_ids, zeros
from simpletuner.families.repository import Repository, fingerprint_file, verify_file

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "CELL_PX",
    "ENCODER_FILE",
    "PREVIEWER_FILE",
    "PROMPT_TOKENS",
    "ClipEncoder",
    "SemanticCompressor",
    "load_previewer",
    "loose_file",
    "own_encoder",
    "size_of",
    "verify_previewer",
]

ENCODER_FILE = "effnet_encoder.safetensors"
PREVIEWER_FILE = "previewer.safetensors"
PROMPT_TOKENS = 77
CELL_PX = 128 / 3
SCALE = 0.75
"""A picture is reduced to this before it is encoded: one latent cell, 32 px of what the encoder sees, is 128/3 px of it."""


@dataclass(frozen=True)
class ClipEncoder:
    """CLIP-G's last layer before its final norm, padding included (the prior reads it), and the pooled projection."""

    repository: Repository
    lending: common.Lending

    @cached_property
    def recipe(self) -> Recipe:
        facts = {
            "weights": self.repository.fingerprint("text_encoder"),
            "tokenizer": self.repository.fingerprint("tokenizer"),
            **self.lending.facts,
            "tokens": PROMPT_TOKENS,
        }
        return Recipe("clip-g", facts)

    @property
    def precision(self) -> str:
        return self.lending.precision

    def longest(self) -> Embeds:
        config = self.repository.json("text_encoder/config.json")
        shapes = {"text_LD": (PROMPT_TOKENS, config["hidden_size"]), "pooled_D": (config["projection_dim"],)}
        return zeros(shapes, self.lending.dtype)

    def hollow(self) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        return hollow(CLIPTextModelWithProjection, self.repository, "text_encoder", self.lending.dtype)

    def rehearse(self, network: nn.Module, size: int) -> Any:
        return network(token_ids(size, PROMPT_TOKENS), output_hidden_states=True)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.repository.component("tokenizer").folder, local_files_only=True)

    def load(self, device: str) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        return self.lending.load(CLIPTextModelWithProjection, self.repository.weights("text_encoder"), device)

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        with common.on_loan(lambda: self.load(device), device, is_offloaded=self.lending.is_offloaded) as model:
            yield lambda prompts: self.encode(model(), prompts, device)

    def encode(self, model: Any, prompts: list[Prompt], device: str) -> list[Embeds]:
        """Each prompt's embeds. Negative prompts and dropped captions are encoded as any other."""
        import torch

        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt")
        with torch.no_grad():
            answer = model(
                tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device),
                output_hidden_states=True,
            )
        text_BLD, pooled_BD = answer.hidden_states[-1].cpu(), answer.text_embeds.cpu()
        return [{"text_LD": text.clone(), "pooled_D": pooled.clone()} for text, pooled in zip(text_BLD, pooled_BD, strict=True)]


@dataclass(frozen=True)
class SemanticCompressor:
    """EfficientNetV2-S in float32: 42.67-fold smaller, 16 channels. Its running statistics are the only normalisation."""

    own: str | None
    """Its file, if the user names one."""
    repositories: tuple[Repository, ...]
    """Else looked for at their roots."""
    is_sliced: bool = False
    """One picture at a time, as with `vae_batch_size` 1: no part of the recipe, which keeps cached latents."""
    is_offloaded: bool = False

    @cached_property
    def file(self) -> Path:
        """Where it lies, fetched if need be. Raises UserError."""
        return own_encoder(Path(self.own)) if self.own else loose_file(ENCODER_FILE, self.repositories)

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe("effnet", {"weights": fingerprint_file(self.file), "dtype": "float32", "scale": SCALE})

    def verify(self) -> None:
        """Raises UserError unless the file holds this network's weights, by its header. Loads none."""
        import torch

        with torch.device("meta"):
            self._network(described(self.file))

    def load(self) -> nn.Module:
        from safetensors.torch import load_file

        weights = load_file(self.file)
        return filled(self._network(weights), weights)

    def _network(self, weights: Mapping[str, Tensor]) -> nn.Module:
        from simpletuner.networks.effnet import EfficientNetEncoder, layout_of

        layout = layout_of(weights)
        if layout is None:
            raise UserError(
                f"`{self.file}` is not Stable Cascade's image encoder: no EfficientNetV2-S of a known width.",
                mend=f"use the `{ENCODER_FILE}` of the hub repository `stabilityai/stable-cascade`.",
            )
        return fitting(EfficientNetEncoder(layout), weights, self.file, ENCODER_FILE)

    def hollow(self) -> nn.Module:
        import torch

        from simpletuner.networks.effnet import PUBLISHED, EfficientNetEncoder, layout_of

        places = [repository.here(ENCODER_FILE) for repository in self.repositories]
        file = own_encoder(Path(self.own)) if self.own else next((place for place in places if place is not None), None)
        layout = None if file is None or not file.is_file() else layout_of(described(file))
        with torch.device("meta"):
            return EfficientNetEncoder(layout or PUBLISHED).eval()

    def rehearse(self, network: nn.Module, pixels_B3HW: Tensor) -> Any:
        return network(self._reduced(pixels_B3HW))

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        with common.on_loan(self.load, device, is_offloaded=self.is_offloaded) as encoder:
            yield lambda pixels_B3HW, _keys: self.encode(encoder(), pixels_B3HW, device)

    def encode(self, encoder: nn.Module, pixels_B3HW: Tensor, device: str) -> Tensor:
        import torch

        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            reduced_B3HW = self._reduced(pixels_B3HW.to(device, torch.float32))
            slices = reduced_B3HW.split(1) if self.is_sliced else (reduced_B3HW,)
            return torch.cat([encoder(part_B3HW).cpu() for part_B3HW in slices])

    def _reduced(self, pixels_B3HW: Tensor) -> Tensor:
        from torch.nn.functional import interpolate

        size_HW = [round(edge * SCALE) for edge in pixels_B3HW.shape[-2:]]
        return interpolate(pixels_B3HW, size=size_HW, mode="bilinear", antialias=True)


def size_of(latents_1CHW: Tensor) -> tuple[int, int]:
    """(width, height) in pixels of the picture that these latents stand for."""
    rows, columns = latents_1CHW.shape[-2:]
    return round(columns * CELL_PX), round(rows * CELL_PX)


def verify_previewer(file: Path) -> None:
    """Raises UserError unless the file holds the Previewer's weights, by its header. Loads none."""
    import torch

    with torch.device("meta"):
        _previewer(described(file), file)


def load_previewer(file: Path) -> nn.Module:
    """The network that shows latents without Stage B and A, in float32. Raises UserError."""
    from safetensors.torch import load_file

    weights = load_file(file)
    return filled(_previewer(weights, file), weights)


def _previewer(weights: Mapping[str, Tensor], file: Path) -> nn.Module:
    from simpletuner.networks.previewer import Previewer

    width = len(weights.get("blocks.0.weight", ())) or 512
    return fitting(Previewer(width), weights, file, PREVIEWER_FILE)


def own_encoder(path: Path) -> Path:
    """The image encoder's file, named by it or by its folder. Raises UserError."""
    file = path / ENCODER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"`stable_cascade_effnet_encoder` names the folder `{path}`, which holds no `{ENCODER_FILE}`.",
            mend="name the file itself, or leave the option out: then it is looked for in the model's repositories.",
        )
    return file


def loose_file(name: str, repositories: Sequence[Repository]) -> Path:
    """A file at the root of the first repository that has it. Raises UserError where none has."""
    unreachable: UserError | None = None
    for repository in repositories:
        try:
            if (file := repository.find(name)) is not None:
                return file
        except UserError as error:
            unreachable = error
    if unreachable is not None:
        raise unreachable
    places = " and of ".join(f"`{repository.name}`" for repository in repositories)
    raise UserError(
        f"Stable Cascade's `{name}` is missing.",
        why=f"looked for it at the root of {places}; nothing else can stand in for these weights.",
        mend=f"fetch it with `hf download stabilityai/stable-cascade {name} --local-dir FOLDER`, and put it there"
        + (', or name it with "stable_cascade_effnet_encoder".' if name == ENCODER_FILE else "."),
    )


def described(file: Path) -> StateDict:
    """The tensors of a safetensors file without their numbers. Raises UserError if it is not whole."""
    import torch
    from safetensors import safe_open

    verify_file(file)
    with safe_open(file, "pt") as opened:
        return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in opened.keys()}  # noqa: SIM118


def fitting(network: nn.Module, weights: Mapping[str, Tensor], file: Path, published: str) -> nn.Module:
    """`network`, if these are just its weights. Raises UserError if one is missing, unknown or of another shape."""
    own = network.state_dict()
    misfits = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    wrong = {"missing": own.keys() - weights.keys(), "of another shape": misfits, "unknown": weights.keys() - own.keys()}
    told = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in wrong.items() if names]
    if told:
        raise UserError(
            f"`{file}` is not whole: of its weights are {'; '.join(told)}.",
            why="the network would go on with random numbers in their place, without an error.",
            mend=f"fetch it again: `hf download stabilityai/stable-cascade {published} --local-dir FOLDER`.",
        )
    return network


def filled(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """`network` with these weights, in eval mode."""
    network.load_state_dict(dict(weights), strict=True)
    return network.eval()
