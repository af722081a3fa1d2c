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
from simpletuner.families.hollow import hollow, token_ids, zeros
from simpletuner.families.repository import Repository

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = ["CLIP_TOKENS", "Autoencoder", "ClipEncoder", "T5Encoder", "Uncond"]

CLIP_TOKENS = 77

Uncond = Literal["empty_string", "zero"]
"""What the empty text is that guidance leads away from, and that stands for dropped captions."""


@dataclass(frozen=True)
class ClipEncoder:
    """One of the two CLIP text models: its last hidden states but one, and its projection of the whole text."""

    repository: Repository
    number: Literal[1, 2]
    lending: common.Lending
    uncond: Uncond

    @property
    def suffix(self) -> str:
        return "" if self.number == 1 else "_2"

    @cached_property
    def recipe(self) -> Recipe:
        facts = {
            "weights": self.repository.fingerprint(f"text_encoder{self.suffix}"),
            "tokenizer": self.repository.fingerprint(f"tokenizer{self.suffix}"),
            **self.lending.facts,
            "tokens": CLIP_TOKENS,
            "uncond": self.uncond,
        }
        return Recipe("clip-l" if self.number == 1 else "clip-g", facts)

    @property
    def precision(self) -> str:
        return self.lending.precision

    def longest(self) -> Embeds:
        config = self.repository.json(f"text_encoder{self.suffix}/config.json")
        shapes = {f"clip_{self.number}_LD": (CLIP_TOKENS, config["hidden_size"])}
        return zeros({**shapes, f"pooled_{self.number}_D": (config["projection_dim"],)}, self.lending.dtype)

    def hollow(self) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        return hollow(CLIPTextModelWithProjection, self.repository, f"text_encoder{self.suffix}", self.lending.dtype)

    def rehearse(self, network: nn.Module, size: int) -> Any:
        return network(token_ids(size, CLIP_TOKENS), output_hidden_states=True)

    def load(self, device: str) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        weights = self.repository.weights(f"text_encoder{self.suffix}")
        return self.lending.load(CLIPTextModelWithProjection, weights, device)

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        tokenizer = tokenizer_in(self.repository, f"tokenizer{self.suffix}")
        with common.on_loan(lambda: self.load(device), device, is_offloaded=self.lending.is_offloaded) as model:
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
    lending: common.Lending
    tokens: int
    padding: Literal["unmodified", "zero"]
    uncond: Uncond

    @cached_property
    def recipe(self) -> Recipe:
        facts = {
            "weights": self.repository.fingerprint("text_encoder_3"),
            "tokenizer": self.repository.fingerprint("tokenizer_3"),
            **self.lending.facts,
            "tokens": self.tokens,
            "padding": self.padding,
            "uncond": self.uncond,
        }
        return Recipe("t5", facts)

    @property
    def precision(self) -> str:
        return self.lending.precision

    def longest(self) -> Embeds:
        width = self.repository.json("text_encoder_3/config.json")["d_model"]
        return zeros({"t5_LD": (self.tokens, width)}, self.lending.dtype)

    def hollow(self) -> nn.Module:
        from transformers import T5EncoderModel

        return hollow(T5EncoderModel, self.repository, "text_encoder_3", self.lending.dtype)

    def rehearse(self, network: nn.Module, size: int) -> Any:
        return network(token_ids(size, self.tokens))

    def load(self, device: str) -> nn.Module:
        from transformers import T5EncoderModel

        return self.lending.load(T5EncoderModel, self.repository.weights("text_encoder_3"), device)

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        tokenizer = tokenizer_in(self.repository, "tokenizer_3")
        with common.on_loan(lambda: self.load(device), device, is_offloaded=self.lending.is_offloaded) as model:
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
    """The autoencoder in float32. A latent is one draw of the posterior, by the picture's own key; shifted, then scaled."""

    repository: Repository
    tile_px: int | None = None
    """Larger pictures pass through in overlapping tiles of this edge."""
    is_sliced: bool = False
    """One picture at a time, as with `vae_batch_size` 1: no part of the recipe, which keeps cached latents."""
    is_offloaded: bool = False

    @cached_property
    def recipe(self) -> Recipe:
        config = self.repository.json("vae/config.json")
        facts = {
            **({} if self.tile_px is None else {"tile_px": self.tile_px}),
            "weights": self.repository.fingerprint("vae"),
            "dtype": "float32",
            "shift": config["shift_factor"],
            "scale": config["scaling_factor"],
        }
        return Recipe("sd3-vae", facts)

    def load(self) -> nn.Module:
        from diffusers import AutoencoderKL

        return self._set_up(common.load_whole(AutoencoderKL, self.repository.weights("vae"), "float32"))

    def hollow(self) -> nn.Module:
        from diffusers import AutoencoderKL

        return self._set_up(hollow(AutoencoderKL, self.repository, "vae", "float32"))

    def rehearse(self, network: Any, pixels_B3HW: Tensor) -> Any:
        return network.encode(pixels_B3HW)

    def _set_up(self, vae: Any) -> nn.Module:
        if self.tile_px is not None:
            # The tiles' size has no setting of its own: it is the model's sample size, 1024 px (diffusers 0.42).
            vae.tile_sample_min_size = self.tile_px
            vae.tile_latent_min_size = self.tile_px // 2 ** (len(vae.config.block_out_channels) - 1)
            vae.enable_tiling()
        if self.is_sliced:
            vae.enable_slicing()
        return vae

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        with common.on_loan(self.load, device, is_offloaded=self.is_offloaded) as vae:
            yield lambda pixels_B3HW, keys: self.encode(vae(), pixels_B3HW, keys, device)

    def encode(self, vae: Any, pixels_B3HW: Tensor, keys: Sequence[str], device: str) -> Tensor:
        import torch

        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            posterior = vae.encode(pixels_B3HW.to(device)).latent_dist
            generators = [torch.Generator().manual_seed(draw_seed(key, "posterior")) for key in keys]
            # Drawn on the CPU: the same on every device.
            noise_BCHW = torch.stack([torch.randn(posterior.mean.shape[1:], generator=each) for each in generators])
            sample_BCHW = posterior.mean + posterior.std * noise_BCHW.to(device)
            return ((sample_BCHW - vae.config.shift_factor) * vae.config.scaling_factor).cpu()

    def decode(self, vae: Any, latents_1CHW: Tensor) -> Image:
        import torch
        from diffusers.image_processor import VaeImageProcessor

        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            latents_1CHW = latents_1CHW.to(vae.device, torch.float32) / vae.config.scaling_factor + vae.config.shift_factor
            pixels_13HW = vae.decode(latents_1CHW, return_dict=False)[0]
        [picture] = VaeImageProcessor().postprocess(pixels_13HW, output_type="pil")
        return picture
