"""Embeds made while training, where prompts have no cache (`text_cache_disable`) or one that fills (`text_cache_ondemand`).

Prompts are encoded in the chunks that a cache would be filled by, to the same bits, by all text encoders one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from torch import Tensor

from simpletuner.data.cache import KEY_DTYPE
from simpletuner.data.keep import Keep, Pending
from simpletuner.data.manifest import Texts
from simpletuner.data.prompts import prompt_key
from simpletuner.data.samples import Embeds, Prompt

__all__ = ["LiveEncoder", "LivePrompts"]


@dataclass(frozen=True)
class LiveEncoder:
    """A text encoder that stays lent, and where what it makes is kept."""

    encode: Callable[[list[Prompt]], list[Embeds]]
    keep: Keep


class LivePrompts:
    """The embeds of all prompts, over all encoders. `fetch` is for the thread that reads ahead, the rest for the loop's own."""

    def __init__(self, prompts: Iterable[Prompt], encoders: Sequence[LiveEncoder], *, text_encoder_batch_size: int) -> None:
        self._order = _Order(prompts)
        self._encoders = encoders
        self._batch_size = text_encoder_batch_size
        self._held: dict[Prompt, Embeds] = {}

    def hold(self, prompts: Iterable[Prompt]) -> None:
        """Encode these now and never forget them: nobody who asks for them waits for an encoder."""
        self._held.update({prompt: self.get(prompt) for prompt in prompts})

    def get(self, prompt: Prompt) -> Embeds:
        """One prompt's embeds, at once."""
        if (embeds := self._kept(prompt)) is not None:
            return embeds
        embeds = {}
        for encoder in self._encoders:
            embeds.update(self._made(encoder, prompt))
        return embeds

    def fetch(self, prompts: Sequence[Prompt]) -> Pending[list[Embeds]]:
        """What is kept of some prompts; the rest is encoded at the end."""
        found = [self._kept(prompt) for prompt in prompts]

        def finish() -> list[Embeds]:
            return [self.get(prompt) if kept is None else kept for prompt, kept in zip(prompts, found, strict=True)]

        return Pending(finish, is_ready=all(kept is not None for kept in found))

    def _kept(self, prompt: Prompt) -> Embeds | None:
        """The embeds of a prompt that all encoders have encoded."""
        if prompt in self._held:
            return self._held[prompt]
        embeds: Embeds = {}
        for encoder in self._encoders:
            part = encoder.keep.get(prompt_key(prompt))
            if part is None:
                return None
            embeds.update(part)
        return embeds

    def _made(self, encoder: LiveEncoder, prompt: Prompt) -> Mapping[str, Tensor]:
        """One encoder's part of a prompt, made now with its chunk unless it is kept."""
        if (part := encoder.keep.get(prompt_key(prompt))) is not None:
            return part
        chunk = [one for one in self._order.chunk_of(prompt, self._batch_size) if not encoder.keep.has(prompt_key(one))]
        items = [(prompt_key(one), part) for one, part in zip(chunk, encoder.encode(chunk), strict=True)]
        encoder.keep.put(items)
        return dict(items)[prompt_key(prompt)]


class _Order:
    """All prompts in the order in which a cache is filled, each once; about a hundred bytes more than its text."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        unique = list(dict.fromkeys(prompts))
        self._texts = Texts.of(f"{prompt.role} {prompt.text}" for prompt in unique)
        keys = np.array([prompt_key(prompt) for prompt in unique], KEY_DTYPE)
        self._places = np.argsort(keys)
        self._sorted = keys[self._places]

    def chunk_of(self, prompt: Prompt, size: int) -> list[Prompt]:
        """What a prompt is encoded with: `size` prompts, or fewer at the end. One that nobody foresaw goes alone."""
        key = np.bytes_(prompt_key(prompt).encode())
        row = int(np.searchsorted(self._sorted, key))
        if row == len(self._sorted) or self._sorted[row] != key:
            return [prompt]
        first = int(self._places[row]) // size * size
        return [self._at(place) for place in range(first, min(first + size, len(self._sorted)))]

    def _at(self, place: int) -> Prompt:
        role, _, text = self._texts.at(place).partition(" ")
        return Prompt(text, cast(Literal["cond", "uncond"], role))
