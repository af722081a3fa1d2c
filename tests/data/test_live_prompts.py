"""Embeds made while training are a cache's to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.data.cache import TensorCache
from simpletuner.data.keep import Keep, Memory, OnDisk
from simpletuner.data.live_prompts import LiveEncoder, LivePrompts
from simpletuner.data.prompts import UNCOND, PromptStore
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Embeds, Prompt, Recipe

PROMPTS = [UNCOND, *(Prompt(f"caption {n}, {n % 3}") for n in range(9)), Prompt("caption 1, 1"), Prompt("bad", "uncond")]
BATCH = 4


class Letters:
    """A text encoder whose last bits depend on the batch."""

    item_bytes = 160

    def __init__(self, name: str) -> None:
        self.recipe = Recipe(name, {})
        self.chunks: list[list[Prompt]] = []

    @contextmanager
    def lent(self, device: str) -> Iterator[Any]:
        yield self.encode

    def encode(self, prompts: list[Prompt]) -> list[Embeds]:
        self.chunks.append(prompts)
        texts = [f"{prompt.role} {prompt.text}".ljust(20)[:20] for prompt in prompts]
        return [
            {self.recipe.name: torch.tensor([float(ord(letter)) for letter in text]) * (1 + len(prompts) * 1e-3)}
            for text in texts
        ]


def cached(folder: Path) -> PromptStore:
    encoders = [Letters("one"), Letters("two")]
    store = PromptStore(folder, [each.recipe for each in encoders], write_batch_size=4, text_encoder_batch_size=BATCH)
    for each in encoders:
        store.fill(each, PROMPTS, device="cpu", ranks=Alone(), tell=lambda event: None)
    return store


def same(left: Embeds, right: Embeds) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def live(encoders: list[Letters], keeps: list[Keep]) -> LivePrompts:
    lent = [LiveEncoder(each.encode, keep) for each, keep in zip(encoders, keeps, strict=True)]
    return LivePrompts(PROMPTS, lent, text_encoder_batch_size=BATCH)


@pytest.mark.parametrize("limit_bytes", [1, 10_000])
def test_embeds_are_those_of_a_cache_to_the_bit(tmp_path: Path, limit_bytes: int) -> None:
    reference = cached(tmp_path)
    store = live([Letters("one"), Letters("two")], [Memory(limit_bytes), Memory(limit_bytes)])
    asked = [PROMPTS[n] for n in (11, 3, 0, 3, 8)]
    pending = store.fetch(asked)
    assert not pending.is_ready
    assert all(same(embeds, reference.get(prompt)) for prompt, embeds in zip(asked, pending.finish(), strict=True))


def test_each_prompt_is_encoded_once_while_there_is_room() -> None:
    encoder = Letters("one")
    store = live([encoder], [Memory()])
    for _ in range(2):
        store.fetch(PROMPTS).finish()
    encoded = [prompt for chunk in encoder.chunks for prompt in chunk]
    assert sorted(map(str, encoded)) == sorted(map(str, set(PROMPTS)))
    assert store.fetch(PROMPTS[:2]).is_ready


def test_prompts_that_are_held_are_never_encoded_again() -> None:
    encoder = Letters("one")
    store = live([encoder], [Memory(limit_bytes=1)])
    store.hold([UNCOND, Prompt("bad", "uncond")])
    calls = len(encoder.chunks)
    store.get(Prompt("caption 5, 2"))
    assert store.fetch([UNCOND, Prompt("bad", "uncond")]).is_ready
    assert len(encoder.chunks) == calls + 1


def test_a_prompt_that_nobody_foresaw_is_encoded_alone() -> None:
    encoder = Letters("one")
    live([encoder], [Memory()]).get(Prompt("a surprise"))
    assert encoder.chunks == [[Prompt("a surprise")]]


def test_a_cache_filled_on_demand_is_the_cache_that_is_filled_ahead(tmp_path: Path) -> None:
    reference = cached(tmp_path / "ahead")
    encoder = Letters("one")
    cache = TensorCache(tmp_path / "live", encoder.recipe)
    with cache.writer(4) as writer:
        store = live([encoder], [OnDisk(cache, writer, is_shared=False)])
        store.fetch([PROMPTS[5]]).finish()
        assert encoder.chunks == [PROMPTS[4:8]]
        store.fetch(PROMPTS).finish()
    later = PromptStore(tmp_path / "live", [encoder.recipe], write_batch_size=4, text_encoder_batch_size=BATCH)
    assert later.missing(encoder.recipe, PROMPTS) == []
    assert all(torch.equal(later.get(prompt)["one"], reference.get(prompt)["one"]) for prompt in PROMPTS)
