"""CLIP-L's view of a picture, which Stable Cascade's prior hears beside the text: of a share of samples while training.

Shape letters:  B batch,  D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from simpletuner.data.samples import Recipe
from simpletuner.families import common
from simpletuner.families.cascade_pictures import undisturbed
from simpletuner.families.hollow import hollow
from simpletuner.families.repository import Repository

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ClipImageEncoder"]


@dataclass(frozen=True)
class ClipImageEncoder:
    """CLIP-L's projected image embedding in float32, of the picture as it is trained on, prepared as the repository says."""

    repository: Repository
    is_offloaded: bool = False

    @cached_property
    def recipe(self) -> Recipe:
        facts = {
            "weights": self.repository.fingerprint("image_encoder"),
            "processor": self.repository.fingerprint("feature_extractor"),
            "dtype": "float32",
        }
        return Recipe("clip-l-image", facts)

    @cached_property
    def processor(self) -> Any:
        with undisturbed():
            from transformers import CLIPImageProcessor

            return CLIPImageProcessor.from_pretrained(
                self.repository.component("feature_extractor").folder, local_files_only=True
            )

    def hollow(self) -> nn.Module:
        from transformers import CLIPVisionModelWithProjection

        return hollow(CLIPVisionModelWithProjection, self.repository, "image_encoder", "float32")

    def rehearse(self, network: Any, pixels_B3HW: Tensor) -> Tensor:
        edge = network.config.image_size
        return network(pixels_B3HW.new_zeros(len(pixels_B3HW), 3, edge, edge)).image_embeds

    def load(self) -> nn.Module:
        from transformers import CLIPVisionModelWithProjection

        return common.load_whole(CLIPVisionModelWithProjection, self.repository.weights("image_encoder"), "float32")

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        with common.on_loan(self.load, device, is_offloaded=self.is_offloaded) as encoder:
            yield lambda pixels_B3HW, _keys: self.encode(encoder(), pixels_B3HW, device)

    def encode(self, encoder: Any, pixels_B3HW: Tensor, device: str) -> Tensor:
        """(B, D) float32 on the CPU."""
        import torch
        from PIL import Image

        eight_bits_BHW3 = ((pixels_B3HW + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        pictures = [Image.fromarray(picture_HW3.numpy()) for picture_HW3 in eight_bits_BHW3]
        prepared_B3HW = self.processor(pictures, return_tensors="pt").pixel_values
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            return encoder(prepared_B3HW.to(device)).image_embeds.cpu()
