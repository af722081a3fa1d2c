"""`simpletuner text-cache` against the bare encoder: prompts a second of a CLIP of some size, and bytes a prompt on disk.

The encoder has CLIP-G's shape at a quarter of its width and a third of its depth, so that encoding and not Python is timed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from common import Figure, arguments, least_cpu_s, say, scratch, tell
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from simpletuner.data.prompts import PromptStore, prompt_bytes
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Prompt
from simpletuner.examples.tiny import build_model
from simpletuner.families.cascade_parts import ClipEncoder
from simpletuner.families.common import Lending
from simpletuner.families.repository import Repository

BATCH = 8
CLIP_G_NUMBERS = 77 * 1280 + 1280
LEAST = 0.9


def repository_with(folder: Path, *, width: int, layers: int) -> Repository:
    """The tiny Stable Cascade with a larger text encoder."""
    build_model("stable_cascade", folder)
    prior = folder / "stable-cascade-prior"
    config = CLIPTextConfig.from_pretrained(prior / "text_encoder")
    settings: dict[str, Any] = config.to_dict() | {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    torch.manual_seed(0)
    CLIPTextModelWithProjection(CLIPTextConfig(**settings)).save_pretrained(prior / "text_encoder")
    return Repository(str(prior))


def main() -> None:
    options = arguments(__doc__, prompts=256, rounds=3)
    with scratch() as folder:
        encoder = ClipEncoder(repository_with(folder / "model", width=320, layers=10), Lending("float32"))
        prompts = [Prompt(f"a photo of a red cat, number {number}") for number in range(options.prompts)]
        counter = itertools.count()
        model = encoder.load("cpu").requires_grad_(False)

        def bare() -> None:
            for start in range(0, len(prompts), BATCH):
                encoder.encode(model, prompts[start : start + BATCH], "cpu")

        def cached() -> None:
            store = PromptStore(
                folder / str(next(counter)), [encoder.recipe], write_batch_size=128, text_encoder_batch_size=BATCH
            )
            store.fill(encoder, prompts, device="cpu", ranks=Alone(), tell=say)

        seconds = least_cpu_s({"bare": bare, "cached": cached}, options.rounds)
        written = sum(path.stat().st_size for path in (folder / "0").rglob("shard-*")) / len(prompts)
        share = written / prompt_bytes(encoder)
    tell(
        [
            Figure("bare encoder in batches", len(prompts) / seconds["bare"], "prompts/s"),
            Figure("text cache, loading the encoder included", len(prompts) / seconds["cached"], "prompts/s"),
            Figure("share of the bare rate", seconds["bare"] / seconds["cached"], "", least=LEAST),
            Figure("bytes on disk over bytes of the embeds", share, "", most=1.01),
            Figure("a prompt of CLIP-G in float32", share * CLIP_G_NUMBERS * 4 / 1e6, "MB"),
            Figure("a prompt of CLIP-G in bfloat16", share * CLIP_G_NUMBERS * 2 / 1e6, "MB"),
        ],
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
