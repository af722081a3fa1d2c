"""A CLIP of random weights in the layout of the published ones, and a judgement of pictures by hand, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from simpletuner.examples.tiny_tokenizers import clip_tokenizer
from simpletuner.families.common import quiet

EDGE_PX = 28


def build_clip(folder: Path, *, sign: int = 1) -> None:
    """Writes the repository. With a `sign` of -1 every picture is the contrary of every prompt."""
    tokenizer = clip_tokenizer("a red green blue cat dog square")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**shape, "image_size": EDGE_PX, "patch_size": 7},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = CLIPModel(config)
        model.visual_projection.weight.data *= -sign  # chance has it that all cosines are negative
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = {"shortest_edge": EDGE_PX}
        CLIPImageProcessorPil(size=size, crop_size={"height": EDGE_PX, "width": EDGE_PX}).save_pretrained(folder)


def judged(folder: Path, image: Image.Image, prompt: str) -> float:
    """100 times the cosine, by the model's parts: preprocessing by hand, both towers and projections in float64."""
    model = CLIPModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    edge = min(image.size)
    width, height = (round(side * EDGE_PX / edge) for side in image.size)
    left, top = (width - EDGE_PX) // 2, (height - EDGE_PX) // 2
    small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(small.crop((left, top, left + EDGE_PX, top + EDGE_PX))) / 255
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels_13HW = torch.tensor((pixels - mean) / deviation).movedim(-1, 0)[None]
    tokens = clip_tokenizer("a red green blue cat dog square")(prompt, truncation=True, max_length=77, return_tensors="pt")

    def unit(vector: Tensor) -> Tensor:
        return vector / vector.norm()

    with torch.no_grad():
        seen = unit(model.visual_projection(model.vision_model(pixels_13HW).pooler_output))
        read = unit(model.text_projection(model.text_model(tokens.input_ids).pooler_output))
    return 100 * (seen * read).sum().item()
