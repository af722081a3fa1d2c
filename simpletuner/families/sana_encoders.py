"""Sana's encoders, each lent by itself: Gemma for prompts, the deep compression autoencoder for pictures.

What they give equals the stock `SanaPipeline`.
Shape letters:  B batch,  C latent channels,  H W latent rows and columns,  L tokens,  D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from simpletuner.data.samples import Embeds, Prompt, Recipe
from simpletuner.errors import UserError
from simpletuner.families import common
from simpletuner.families.hollow import hollow, token_ids, zeros
from simpletuner.families.repository import Repository

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = ["PROMPT_TOKENS", "DeepCompressionAutoencoder", "GemmaEncoder"]

PROMPT_TOKENS = 300


@dataclass(frozen=True)
class GemmaEncoder:
    """Gemma's last hidden states, trimmed to the tokens that the mask shows."""

    repository: Repository
    instruction: str
    lending: common.Lending

    @cached_property
    def recipe(self) -> Recipe:
        facts = {
            "weights": self.repository.fingerprint("text_encoder"),
            "tokenizer": self.repository.fingerprint("tokenizer"),
            **self.lending.facts,
            "instruction": self.instruction,
            "tokens": PROMPT_TOKENS,
        }
        return Recipe("gemma", facts)

    @property
    def precision(self) -> str:
        return self.lending.precision

    def longest(self) -> Embeds:
        width = self.repository.json("text_encoder/config.json")["hidden_size"]
        return zeros({"prompt_LD": (PROMPT_TOKENS, width)}, self.lending.dtype)

    def hollow(self) -> nn.Module:
        from transformers import AutoModel

        return hollow(AutoModel, self.repository, "text_encoder", self.lending.dtype)

    def rehearse(self, network: nn.Module, size: int) -> Any:
        # Without the tokenizer, which may not be here yet: English has about four letters a token.
        ids_BL = token_ids(size, PROMPT_TOKENS + len(self.instruction) // 4)
        return network(ids_BL, attention_mask=ids_BL + 1, use_cache=False)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.repository.component("tokenizer").folder, local_files_only=True)
        tokenizer.padding_side = "right"
        return tokenizer

    def load(self, device: str) -> nn.Module:
        from transformers import AutoModel

        return self.lending.load(AutoModel, self.repository.weights("text_encoder"), device)

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        with common.on_loan(lambda: self.load(device), device, is_offloaded=self.lending.is_offloaded) as model:
            yield lambda prompts: self.encode(model(), prompts, device)

    def encode(self, model: Any, prompts: list[Prompt], device: str) -> list[Embeds]:
        """Each prompt's embeds, in order. The roles pass through the model apart, since they differ in length."""
        embeds: dict[int, Embeds] = {}
        for role, prefix in (("cond", self.instruction), ("uncond", "")):
            places = [place for place, prompt in enumerate(prompts) if prompt.role == role]
            if places:
                texts = [prefix + prompts[place].text.lower().strip() for place in places]
                embeds.update(zip(places, self.encode_texts(model, texts, prefix, device), strict=True))
        return [embeds[place] for place in range(len(prompts))]

    def encode_texts(self, model: Any, texts: list[str], prefix: str, device: str) -> list[Embeds]:
        import torch

        # The prefix counts with its <bos>. <bos> and the last 299 tokens are kept: a piece of the prefix, the prompt, padding.
        length = len(self.tokenizer.encode(prefix)) + PROMPT_TOKENS - 2 if prefix else PROMPT_TOKENS
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            # Nothing is generated, so keys and values need not be kept: 50 MB a prompt.
            hidden_BLD = model(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device), use_cache=False)[0]
        kept = [0, *range(1 - PROMPT_TOKENS, 0)]
        shown_B = tokens.attention_mask[:, kept].sum(1).tolist()
        if not all(shown_B):
            raise UserError(
                f"The tokenizer of `{self.repository.name}` gives no token for an empty prompt.",
                why="Gemma's puts a <bos> before every text, and Sana keeps its position.",
                mend="use the tokenizer files of the original repository.",
            )
        return [
            {"prompt_LD": rows_LD[:shown].clone()} for rows_LD, shown in zip(hidden_BLD[:, kept].cpu(), shown_B, strict=True)
        ]


@dataclass(frozen=True)
class DeepCompressionAutoencoder:
    """DC-AE in float32 (its encoder is unstable in fp16); latents are scaled, and nothing else.

    One picture at a time is no part of the recipe: it is what `vae_batch_size` 1 does, which keeps cached latents too.
    """

    repository: Repository
    tile_px: int
    is_sliced: bool
    is_offloaded: bool

    @cached_property
    def recipe(self) -> Recipe:
        scale = self.repository.json("vae/config.json")["scaling_factor"]
        facts = {"weights": self.repository.fingerprint("vae"), "dtype": "float32", "scale": scale, "tile_px": self.tile_px}
        return Recipe("dc-ae", facts)

    def load(self) -> nn.Module:
        from diffusers import AutoencoderDC

        return self._set_up(common.load_whole(AutoencoderDC, self.repository.weights("vae"), "float32"))

    def hollow(self) -> nn.Module:
        from diffusers import AutoencoderDC

        return self._set_up(hollow(AutoencoderDC, self.repository, "vae", "float32"))

    def rehearse(self, network: Any, pixels_B3HW: Tensor) -> Any:
        return network.encode(pixels_B3HW)

    def _set_up(self, vae: Any) -> nn.Module:
        stride_px = self.tile_px * 7 // 8
        vae.enable_tiling(self.tile_px, self.tile_px, stride_px, stride_px)
        if self.is_sliced:
            vae.enable_slicing()
        return vae

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        with common.on_loan(self.load, device, is_offloaded=self.is_offloaded) as vae:
            yield lambda pixels_B3HW, _keys: self.encode(vae(), pixels_B3HW)

    def encode(self, vae: Any, pixels_B3HW: Tensor) -> Tensor:
        import torch

        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            return (vae.encode(pixels_B3HW.to(vae.device)).latent * vae.config.scaling_factor).cpu()

    def decode(self, vae: Any, latents_1CHW: Tensor) -> Image:
        import torch
        from diffusers.image_processor import PixArtImageProcessor

        with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
            latents_1CHW = latents_1CHW.to(vae.device, torch.float32) / vae.config.scaling_factor
            pixels_13HW = vae.decode(latents_1CHW, return_dict=False)[0]
        [picture] = PixArtImageProcessor().postprocess(pixels_13HW, output_type="pil")
        return picture
