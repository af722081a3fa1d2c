"""The CLIP score: how well a picture fits its prompt, 100 times the cosine of both CLIP embeddings, at least 0.

After Hessel et al. 2021 (CLIPScore), scaled by 100 as torchmetrics does. The judge is loaded once a gallery, when denoiser and
decoder are at rest, and is gone afterwards; its attention is its own, whatever kernels paint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.config.run import Run
from simpletuner.errors import UserError
from simpletuner.events import Weights
from simpletuner.families.common import load_whole, on_loan
from simpletuner.families.repository import Component, Repository

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ClipScore", "figures_of", "judge_needs", "verify_judge"]

OPTION = "pretrained_evaluation_model_name_or_path"
NEEDED = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))
"""Small files beside the configuration, of each of which one name must be there."""
NAMES: dict[Weights, str] = {"trained": "clip_score", "ema": "clip_score/ema", "base": "clip_score/base"}
"""What trackers call the scores of a gallery."""


class ClipScore:
    """Scores pictures by the CLIP of a repository, found at once: raises UserError if there is none."""

    def __init__(self, run: Run) -> None:
        self._component = _component(_repository(run.scores.pretrained_evaluation_model_name_or_path))

    def scores(self, pictures: Iterable[tuple[Image, str]], *, device: str) -> list[float]:
        """The score of each picture against its prompt, which is cut to CLIP's 77 tokens."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        folder = self._component.folder
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        with on_loan(lambda: load_whole(CLIPModel, self._component, "float32"), device) as judge:
            return [_score(judge(), tokenizer, processor, image, prompt) for image, prompt in pictures]


def _score(model: Any, tokenizer: Any, processor: Any, image: Image, prompt: str) -> float:
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt").to(model.device)
    pixels_13HW = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"].to(model.device)
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        answer = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels_13HW)
    cosine = torch.nn.functional.cosine_similarity(answer.image_embeds, answer.text_embeds)
    return max(0.0, 100 * cosine.item())


def figures_of(scores: Sequence[float], weights: Weights) -> dict[str, float]:
    """Mean, least and greatest of a gallery's scores, as trackers plot them; the same in any order of the scores."""
    name = NAMES[weights]
    return {f"{name}/mean": math.fsum(scores) / len(scores), f"{name}/min": min(scores), f"{name}/max": max(scores)}


def verify_judge(run: Run, *, may_fetch: bool = True) -> None:
    """Raises UserError if the run scores pictures and its CLIP is missing or cut short. Loads no weights.

    Unless it `may_fetch` them, of a hub repository only the configuration is looked at.
    """
    if run.scores.evaluation_type != "clip" or not run.validation.has_gallery:
        return
    repository = _repository(run.scores.pretrained_evaluation_model_name_or_path)
    if repository.is_local or may_fetch:
        _component(repository).verify()


def judge_needs(run: Run) -> list[tuple[Repository, str]]:
    """The repository that a run's judge is read from, wholly (""), as a family tells its own; none if nothing is scored."""
    if run.scores.evaluation_type != "clip" or not run.validation.has_gallery:
        return []
    return [(Repository(run.scores.pretrained_evaluation_model_name_or_path, option=OPTION), "")]


def _repository(name: str) -> Repository:
    """Where the judge lies, found to be a CLIP by its configuration. Raises UserError."""
    repository = Repository(name, option=OPTION)
    kind = repository.json("config.json").get("model_type")
    if kind != "clip":
        raise UserError(
            f"`{name}` holds a {kind}, not a CLIP.",
            why="evaluation_type is clip: pictures and prompts are compared by one.",
            mend=f'set "{OPTION}" to a CLIP in the layout of transformers, such as openai/clip-vit-large-patch14.',
        )
    return repository


def _component(repository: Repository) -> Component:
    """The judge's files, fetched if need be. Raises UserError."""
    component = repository.component("")
    absent = [files[0] for files in NEEDED if not any((component.folder / file).is_file() for file in files)]
    absent += [] if component.weights else ["model.safetensors"]
    if absent:
        raise UserError(
            f"The CLIP `{repository.name}` lacks {', '.join(absent)}.",
            why="weights in other formats are not loaded, since loading them can run code.",
            mend=f'finish its download, or set "{OPTION}" to one that has them, such as openai/clip-vit-large-patch14.',
        )
    return component
