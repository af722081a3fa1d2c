"""SD3's encoders, each lent by itself: two CLIPs, T5 and the autoencoder.

What they give equals the stock `StableDiffusion3Pipeline`. No attention mask enters a text encoder, as there: padding is read
like words, so embeds at one length are not the beginning of those at another.
Shape letters:  B batch,  C latent channels,  H W latent rows and columns,  L tokens,  D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from simpletuner.data.samples import Embeds, Prompt, Recipe, draw_seed
from simpletuner.families import common
from simpletuner.families.repository import Component, Repository

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = ["CLIP_TOKENS", "Autoencoder", "ClipEncoder", "Storage", "T5Encoder", "Uncond"]

CLIP_TOKENS = 77
TILE_PX = 512
"""Edge of the overlapping tiles of `vae_enable_tiling`."""

Uncond = Literal["empty_string", "zero"]
"""What the empty text is that guidance leads away from, and that stands for dropped captions."""


@dataclass(frozen=True)
class Storage:
    """How an encoder's weights lie in memory while it is lent."""

    precision: str
    """`text_encoder_N_precision`."""
    quantize_via: str
    is_offloaded: bool

    @property
    def facts(self) -> dict[str, str]:
        """What of it alters embeds; said only then, so that caches made before there was a choice stay good."""
        return {} if self.precision == "no_change" else {"precision": self.precision}

    def load(self, model_class: Any, component: Component, dtype: str, device: str) -> nn.Module:
        """On the CPU, but for what is quantised on the accelerator."""
        precision, via = self.precision, self.quantize_via
        return common.load_quantised(model_class, component, dtype, precision=precision, via=via, device=device)


@dataclass(frozen=True)
class ClipEncoder:
    """One of the two CLIP text models: its last hidden states but one, and its projection of the whole text."""

    repository: Repository
    number: Literal[1, 2]
    dtype: str
    storage: Storage
    uncond: Uncond

    @property
    def suffix(self) -> str:
        return "" if self.number == 1 else "_2"

    @cached_property
    def recipe(self) -> Recipe:
        facts = {
            "weights": self.repository.fingerprint(f"text_encoder{self.suffix}"),
            "tokenizer": self.repository.fingerprint(f"tokenizer{self.suffix}"),
            "dtype": self.dtype,
            "tokens": CLIP_TOKENS,
            "uncond": self.uncond,
            **self.storage.facts,
        }
        return Recipe("clip-l" if self.number == 1 else "clip-g", facts)

    def load(self, device: str) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        weights = self.repository.weights(f"text_encoder{self.suffix}")
        return self.storage.load(CLIPTextModelWithProjection, weights, self.dtype, device)

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        tokenizer = tokenizer_in(self.repository, f"tokenizer{self.suffix}")
        with common.on_loan(lambda: self.load(device), device, is_offloaded=self.storage.is_offloaded) as model:
            yield lambda prompts: self.encode(model(), tokenizer, prompts, device)

    def encode(self, model: Any, tokenizer: Any, prompts: list[Prompt], device: str) -> list[Embeds]:
        import torch

        ids_BL, _ = tokenised(tokenizer, prompts, CLIP_TOKENS)
        with torch.no_grad():
            answer = model(ids_BL.to(device), output_hidden_states=True)
        hidden_BLD, pooled_BD = answer.hidden_states[-2].cpu(), answer.text_embeds.cpu()
        embeds = []
        for prompt, hidden_LD, pooled_D in zip(prompts, hidden_BLD, pooled_BD, strict=True):
            if is_zero(prompt, self.uncond):
                hidden_LD, pooled_D = hidden_LD.new_zeros(1, hidden_LD.shape[1]), torch.zeros_like(pooled_D)
            embeds.append({f"clip_{self.number}_LD": hidden_LD.clone(), f"pooled_{self.number}_D": pooled_D.clone()})
        return embeds


@dataclass(frozen=True)
class T5Encoder:
    """T5's last hidden states, padded or cut to `tokens`. Rows that are zero at the end are left out: they can be rebuilt."""

    repository: Repository
    dtype: str
    storage: Storage
    tokens: int
    padding: Literal["unmodified", "zero"]
    uncond: Uncond

    @cached_property
    def recipe(self) -> Recipe:
        facts = {
            "weights": self.repository.fingerprint("text_encoder_3"),
            "tokenizer": self.repository.fingerprint("tokenizer_3"),
            "dtype": self.dtype,
            "tokens": self.tokens,
            "padding": self.padding,
            "uncond": self.uncond,
            **self.storage.facts,
        }
        return Recipe("t5", facts)

    def load(self, device: str) -> nn.Module:
        from transformers import T5EncoderModel

        return self.storage.load(T5EncoderModel, self.repository.weights("text_encoder_3"), self.dtype, device)

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        tokenizer = tokenizer_in(self.repository, "tokenizer_3")
        with common.on_loan(lambda: self.load(device), device, is_offloaded=self.storage.is_offloaded) as model:
            yield lambda prompts: self.encode(model(), tokenizer, prompts, device)

    def encode(self, model: Any, tokenizer: Any, prompts: list[Prompt], device: str) -> list[Embeds]:
        import torch

        ids_BL, shown_B = tokenised(tokenizer, prompts, self.tokens)
        with torch.no_grad():
            hidden_BLD = model(ids_BL.to(device))[0].cpu()
        embeds = []
        for prompt, hidden_LD, shown in zip(prompts, hidden_BLD, shown_B, strict=True):
            if is_zero(prompt, self.uncond):
                hidden_LD = hidden_LD.new_zeros(1, hidden_LD.shape[1])
            elif self.padding == "zero":
                hidden_LD = hidden_LD[:shown]
            embeds.append({"t5_LD": hidden_LD.clone()})
        return embeds


def tokenizer_in(repository: Repository, subfolder: str) -> Any:
    """The tokenizer of a component."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(repository.component(subfolder).folder, local_files_only=True)


def tokenised(tokenizer: Any, prompts: list[Prompt], tokens: int) -> tuple[Tensor, list[int]]:
    """(ids (B, L), how many of each text's are no padding), padded or cut to `tokens`."""
    texts = [prompt.text for prompt in prompts]
    answer = tokenizer(texts, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    return answer.input_ids, answer.attention_mask.sum(1).tolist()


def is_zero(prompt: Prompt, uncond: Uncond) -> bool:
    """Whether zeros stand for the encoding. A negative prompt that says something is encoded, or it would not be obeyed."""
    return uncond == "zero" and prompt == Prompt("", "uncond")


@dataclass(frozen=True)
class Autoencoder:
    """The autoencoder in float32. A latent is one draw of the posterior, by the picture's own key; shifted, then scaled.

    One picture at a time is no part of the recipe: it is what `vae_batch_size` 1 does, which keeps cached latents too.
    """

    repository: Repository
    is_tiled: bool
    is_sliced: bool
    is_offloaded: bool

    @cached_property
    def recipe(self) -> Recipe:
        config = self.repository.json("vae/config.json")
        facts = {
            "weights": self.repository.fingerprint("vae"),
            "dtype": "float32",
            "shift": config["shift_factor"],
            "scale": config["scaling_factor"],
            **({"tile_px": TILE_PX} if self.is_tiled else {}),
        }
        return Recipe("sd3-vae", facts)

    def load(self) -> nn.Module:
        from diffusers import AutoencoderKL

        vae: Any = common.load_whole(AutoencoderKL, self.repository.weights("vae"), "float32")
        if self.is_sliced:
            vae.enable_slicing()
        if self.is_tiled:
            vae.enable_tiling()
            cell_px = 2 ** (len(vae.config.block_out_channels) - 1)
            # By itself a tile is as large as the pictures that the model was trained on, and none of those would be cut.
            vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_PX, TILE_PX // cell_px
        return vae

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        with common.on_loan(self.load, device, is_offloaded=self.is_offloaded) as vae:
            yield lambda pixels_B3HW, keys: self.encode(vae(), pixels_B3HW, keys)

    def encode(self, vae: Any, pixels_B3HW: Tensor, keys: Sequence[str]) -> Tensor:
        import torch

        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            posterior = vae.encode(pixels_B3HW.to(vae.device)).latent_dist
            generators = [torch.Generator().manual_seed(draw_seed(key, "posterior")) for key in keys]
            # Drawn on the CPU: the same on every device.
            noise_BCHW = torch.stack([torch.randn(posterior.mean.shape[1:], generator=each) for each in generators])
            sample_BCHW = posterior.mean + posterior.std * noise_BCHW.to(vae.device)
            return ((sample_BCHW - vae.config.shift_factor) * vae.config.scaling_factor).cpu()

    def decode(self, vae: Any, latents_1CHW: Tensor) -> Image:
        import torch
        from diffusers.image_processor import VaeImageProcessor

        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            latents_1CHW = latents_1CHW.to(vae.device, torch.float32) / vae.config.scaling_factor + vae.config.shift_factor
            pixels_13HW = vae.decode(latents_1CHW, return_dict=False)[0]
        [picture] = VaeImageProcessor().postprocess(pixels_13HW, output_type="pil")
        return picture
