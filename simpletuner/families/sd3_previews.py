"""Pictures of SD3 in the making, by a tiny autoencoder: TAESD3 by Ollin Boer Bohan, or one of your own in its layout.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from simpletuner.families import common
from simpletuner.families.repository import Component
from simpletuner.networks.libraries import without

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = ["TAESD3", "tiny_decoder"]

TAESD3 = "madebyollin/taesd3"
NOISE = {"diffusers.configuration_utils": "{'block_out_channels'"}
"""diffusers 0.42 writes this key into every tiny autoencoder's configuration and then warns of it, at each gallery."""


@contextmanager
def tiny_decoder(component: Component, device: str) -> Iterator[Callable[[Tensor], Image]]:
    """Latents (1, C, H, W) -> a picture, as the stock pipeline makes it with this autoencoder for its own. Raises UserError."""
    from diffusers import AutoencoderTiny

    def load() -> nn.Module:
        with without(NOISE):
            return common.load_whole(AutoencoderTiny, component, "float32")

    with common.on_loan(load, device) as vae:
        yield lambda latents_1CHW: decode(vae(), latents_1CHW)


def decode(vae: Any, latents_1CHW: Tensor) -> Image:
    import torch
    from diffusers.image_processor import VaeImageProcessor

    with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
        latents_1CHW = latents_1CHW.to(vae.device, torch.float32) / vae.config.scaling_factor + vae.config.shift_factor
        pixels_13HW = vae.decode(latents_1CHW, return_dict=False)[0]
    [picture] = VaeImageProcessor().postprocess(pixels_13HW, output_type="pil")
    return picture
