"""Encoded prompts: made once by each text encoder, then read from the cache by everyone who needs them.

Which prompts a run needs is asked of `training_prompts` (captions, and "" for dropped ones) and of the gallery; how a prompt is
encoded is the family's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simpletuner.data.cache import TensorCache, item_key
from simpletuner.data.keep import Pending
from simpletuner.data.ranks import Ranks, together
from simpletuner.data.samples import Embeds, Prompt, Recipe, TextEncoder
from simpletuner.events import Notice, Progress, Tell

if TYPE_CHECKING:
    from simpletuner.data.index import ImageSet

__all__ = ["UNCOND", "PromptStore", "prompt_bytes", "prompt_key", "training_prompts"]

UNCOND = Prompt("", "uncond")
"""What stands for a dropped caption."""


def training_prompts(sets: Iterable[ImageSet]) -> Iterator[Prompt]:
    """What training will ask for: a dropped caption, then every caption of every usable picture."""
    yield UNCOND
    for images in sets:
        for i in images.alive().tolist():
            for caption in images.captions(i):
                yield Prompt(caption)


def prompt_bytes(encoder: TextEncoder) -> int:
    """Bytes of one prompt's embeds, at most."""
    return sum(tensor.nbytes for tensor in encoder.longest().values())


class PromptStore:
    """The embeds of all prompts, over all encoders."""

    def __init__(
        self, cache_dir: Path, recipes: Sequence[Recipe], *, write_batch_size: int, text_encoder_batch_size: int
    ) -> None:
        self._caches = {recipe.digest: TensorCache(cache_dir, recipe) for recipe in recipes}
        self._write_batch_size = write_batch_size
        self._batch_size = text_encoder_batch_size

    def missing(self, recipe: Recipe, prompts: Iterable[Prompt]) -> list[Prompt]:
        """The prompts that an encoder has still to encode, each once."""
        unique = list(dict.fromkeys(prompts))
        held = self._caches[recipe.digest].held([prompt_key(prompt) for prompt in unique])
        return [unique[i] for i in np.flatnonzero(~held)]

    def get(self, prompt: Prompt) -> Embeds:
        """One prompt's embeds, those of all encoders together."""
        embeds: Embeds = {}
        for cache in self._caches.values():
            part = cache.get(prompt_key(prompt))
            assert not embeds.keys() & part.keys(), f"two encoders both give {sorted(embeds.keys() & part.keys())}"
            embeds.update(part)
        return embeds

    def fetch(self, prompts: Sequence[Prompt]) -> Pending[list[Embeds]]:
        """The embeds of some prompts, read now."""
        embeds = [self.get(prompt) for prompt in prompts]
        return Pending(lambda: embeds, is_ready=True)

    def fill(self, encoder: TextEncoder, prompts: Iterable[Prompt], *, device: str, ranks: Ranks, tell: Tell) -> None:
        """Encode what is missing, all ranks together. The encoder is loaded only where there is something to do."""
        cache = self._caches[encoder.recipe.digest]
        unique = list(dict.fromkeys(prompts))
        together(ranks, lambda: cache.set_aside(tell) if ranks.rank == 0 else None)
        # Chunks are cut from all prompts, not from the missing ones: a batch of another size may differ in the last bit.
        chunks = [unique[start : start + self._batch_size] for start in range(0, len(unique), self._batch_size)]
        todo = [missing for chunk in chunks[ranks.rank :: ranks.ranks] if (missing := self.missing(encoder.recipe, chunk))]
        total = sum(map(len, todo))

        def work() -> int:
            if todo:
                with encoder.lent(device) as encode, cache.writer(self._write_batch_size) as writer:
                    task, done = f"encoding prompts with {encoder.recipe.name}", 0
                    tell(Progress(task, 0, total, "prompts"))
                    for chunk in todo:
                        embeds = encode(chunk)
                        writer.add([(prompt_key(prompt), part) for prompt, part in zip(chunk, embeds, strict=True)])
                        done += len(chunk)
                        tell(Progress(task, done, total, "prompts"))
            return total

        encoded = sum(together(ranks, work))
        cache.refresh()
        verdict = f"prompts ({encoder.recipe.name}): {len(unique) - encoded:,} reused"
        tell(Notice(f"{verdict}, {encoded:,} encoded" if encoded else verdict))


def prompt_key(prompt: Prompt) -> str:
    """Under which a prompt's embeds are kept."""
    return item_key(prompt.text, prompt.role)
