"""Batches: the plan as tensors, every draw keyed by its micro-batch, read ahead by a thread that ends with its consumer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simpletuner.config.datasets import ImageDataset
from simpletuner.data import batches as batches_module
from simpletuner.data.batches import Batches, Group, ImagePrompts
from simpletuner.data.cache import KEY_DTYPE, TensorCache, item_key
from simpletuner.data.keep import Fetched, Pending
from simpletuner.data.plan import PlanSet, Stream
from simpletuner.data.precompute import LatentStore
from simpletuner.data.prompts import UNCOND, PromptStore, training_prompts
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Batch, Cond, Cursor, Embeds, Place, Prompt, Recipe

BUCKETS = [(64, 64), (32, 64)]
WORDS = ("first", "second", "third")


class Pictures:
    """A set whose sample n is called "<id> n first|second|third"."""

    def __init__(self, name: str, *, is_regularisation: bool = False) -> None:
        self.entry = ImageDataset(id=name, instance_data_dir="x", is_regularisation_data=is_regularisation)

    def file(self, sample: int) -> str:
        return f"{sample}.png"

    def place(self, sample: int) -> Place:
        return Place((100, 100 + sample), (64, 64), (0, 0), (64, 64))

    def captions(self, sample: int) -> tuple[str, ...]:
        return tuple(f"{self.entry.id} {sample} {word}" for word in WORDS)


class Latents:
    """Sample n is all n, in half precision."""

    def get(self, sample: int) -> Tensor:
        return torch.full((2, 4, 4), float(sample), dtype=torch.float16)

    def fetch(self, samples: Sequence[int]) -> Fetched:
        latents = [self.get(sample) for sample in samples]
        return Fetched(tuple(samples), Pending(lambda: latents, is_ready=True))


class Prompts:
    """An embed is the prompt's own letters."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []

    def get(self, prompt: Prompt) -> Embeds:
        self.asked.append(prompt)
        return {"text": torch.tensor([ord(letter) for letter in f"{prompt.role} {prompt.text}".ljust(40)])}

    def fetch(self, prompts: Sequence[Prompt]) -> Pending[list[Embeds]]:
        embeds = [self.get(prompt) for prompt in prompts]
        return Pending(lambda: embeds, is_ready=True)


class OneOf(Alone):
    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks


def collate(embeds: list[Embeds], places: list[Place]) -> Cond:
    heights = torch.tensor([place.original_WH[1] for place in places])
    return {"text": torch.stack([embed["text"] for embed in embeds]), "heights": heights}


def some_batches(
    *,
    seed: int = 1,
    dropout: float = 0.0,
    ranks: Alone | None = None,
    accumulation: int = 1,
    masked: float = 1.0,
    **parts: Any,
) -> Batches:
    plans = [
        PlanSet(np.arange(7), np.arange(7) % 2, BUCKETS, batch_size=2),
        PlanSet(np.arange(3), np.zeros(3, int), BUCKETS, batch_size=3),
    ]
    built: dict[str, Any] = {
        "stream": Stream(plans, seed),
        "sets": [Pictures("cats"), Pictures("plain", is_regularisation=True)],
        "latents": [Latents(), Latents()],
        "prompts": Prompts(),
        "collate": collate,
        **parts,
    }
    return Batches(**built, masked=masked, seed=seed, dropout=dropout, ranks=ranks or Alone(), accumulation=accumulation)


def take(batches: Batches, count: int, cursor: Cursor | None = None) -> list[Group]:
    with closing(batches.groups(cursor or Cursor())) as groups:
        return list(islice(groups, count))


def texts(batch: Batch) -> list[str]:
    return ["".join(map(chr, row)).strip() for row in batch.cond["text"].tolist()]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_batch_holds_what_its_micro_batch_names() -> None:
    batches = some_batches()
    planned = [micro for number in range(2) for micro in batches._stream.epoch(number)]
    for micro, group in zip(planned, take(batches, len(planned)), strict=True):
        [batch] = group.batches
        name = ("cats", "plain")[micro.dataset]
        assert batch.micro == micro
        assert batch.latents_BCHW.shape == (len(micro.ids), 2, 4, 4)
        assert batch.latents_BCHW[:, 0, 0, 0].tolist() == list(micro.ids)
        assert batch.cond["heights"].tolist() == [100 + sample for sample in micro.ids]
        assert batch.files == tuple(f"{name}/{sample}.png" for sample in micro.ids)
        assert batch.is_regularisation == (name == "plain")
        assert [text.split()[1:3] for text in texts(batch)] == [[name, str(sample)] for sample in micro.ids]


def test_every_alternative_caption_is_drawn_and_about_as_often() -> None:
    counts = Counter(
        text.split()[-1] for group in take(some_batches(), 300) for batch in group.batches for text in texts(batch)
    )
    assert counts.keys() == set(WORDS)
    total = counts.total()
    assert all(abs(count / total - 1 / 3) < 0.06 for count in counts.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_captions_are_dropped_as_often_as_asked(dropout: float) -> None:
    prompts = Prompts()
    take(some_batches(dropout=dropout, prompts=prompts), 300)
    share = sum(prompt == UNCOND for prompt in prompts.asked) / len(prompts.asked)
    assert share == pytest.approx(dropout, abs=0.06 if 0 < dropout < 1 else 0)


def test_samples_of_one_batch_are_dropped_one_by_one() -> None:
    dropped = [{text == "uncond" for text in texts(group.batches[0])} for group in take(some_batches(dropout=0.5), 30)]
    assert {True, False} in dropped


def test_dropping_captions_does_not_change_which_are_told_otherwise() -> None:
    without, with_drops = Prompts(), Prompts()
    take(some_batches(prompts=without), 40)
    take(some_batches(prompts=with_drops, dropout=0.5), 40)
    pairs = list(zip(without.asked, with_drops.asked, strict=False))
    assert 0 < sum(told == UNCOND for _, told in pairs) < len(pairs)
    assert all(told in (UNCOND, plain) for plain, told in pairs)


class HalfMasks:
    """The mask of sample n is all n / 100."""

    def get(self, sample: int) -> Tensor:
        return torch.full((1, 4, 4), sample / 100)


def test_masks_go_with_their_samples_and_sets_without_have_none() -> None:
    for group in take(some_batches(masks=[HalfMasks(), None]), 12):
        [batch] = group.batches
        if batch.micro.dataset == 1:
            assert batch.mask_B1HW is None
            continue
        assert batch.mask_B1HW is not None
        assert batch.mask_B1HW.shape == (len(batch.micro.ids), 1, 4, 4)
        assert batch.mask_B1HW[:, 0, 0, 0].tolist() == pytest.approx([sample / 100 for sample in batch.micro.ids])


def test_masks_are_passed_over_as_often_as_asked_and_the_same_after_a_resume() -> None:
    def whole(groups: list[Group]) -> list[bool]:
        masks = [group.batches[0].mask_B1HW for group in groups]
        return [bool(one.min() == 1) for mask in masks if mask is not None for one in mask]

    def batches() -> Batches:
        return some_batches(masks=[HalfMasks(), None], masked=0.3)

    groups = take(batches(), 300)
    shares = whole(groups)
    assert sum(shares) / len(shares) == pytest.approx(0.7, abs=0.06)
    assert whole(take(batches(), 40, groups[9].after)) == whole(groups[10:50])


def test_a_share_of_samples_is_told_of_its_own_picture_whether_its_caption_is_dropped_or_not() -> None:
    class Embedded(Latents):
        def get(self, sample: int) -> Tensor:
            return torch.tensor([1.0 + sample])

    def collated(embeds: list[Embeds], places: list[Place]) -> Cond:
        images = [embed.get("image_D", torch.zeros(1)) for embed in embeds]
        return {**collate(embeds, places), "image": torch.stack(images)}

    prompts = ImagePrompts([Embedded(), Embedded()], 0.3)
    drops: Counter[tuple[bool, bool]] = Counter()
    for group in take(some_batches(image_prompts=prompts, collate=collated, dropout=0.5), 400):
        [batch] = group.batches
        for sample, told, text in zip(batch.micro.ids, batch.cond["image"][:, 0].tolist(), texts(batch), strict=True):
            assert told in (0, 1 + sample)
            drops[told > 0, text == "uncond"] += 1
    total = drops.total()
    assert (drops[True, True] + drops[True, False]) / total == pytest.approx(0.3, abs=0.05)
    assert drops[True, True] / total == pytest.approx(0.15, abs=0.04), "drawn apart"


def test_captions_and_masks_are_those_of_what_stands_in() -> None:
    class Replacing(Latents):
        def fetch(self, samples: Sequence[int]) -> Fetched:
            return super().fetch([6 if sample == 5 else sample for sample in samples])

    seen = 0
    for group in take(some_batches(latents=[Replacing(), Latents()], masks=[HalfMasks(), None]), 40):
        [batch] = group.batches
        if batch.micro.dataset == 0 and 5 in batch.micro.ids:
            place, seen = batch.micro.ids.index(5), seen + 1
            assert texts(batch)[place].startswith("cond cats 6 ")
            assert batch.files[place] == "cats/6.png"
            assert batch.mask_B1HW is not None
            assert batch.mask_B1HW[place].max() == pytest.approx(0.06)
    assert seen


def test_a_resumed_run_sees_the_same_batches_as_an_unbroken_one() -> None:
    unbroken = take(some_batches(dropout=0.3, accumulation=2), 9)
    resumed = take(some_batches(dropout=0.3, accumulation=2), 5, unbroken[3].after)
    for left, right in zip(unbroken[4:], resumed, strict=True):
        assert left.after == right.after
        for one, other in zip(left.batches, right.batches, strict=True):
            assert (one.micro, one.slot, one.slots) == (other.micro, other.slot, other.slots)
            assert torch.equal(one.cond["text"], other.cond["text"])


def test_two_ranks_see_together_what_one_sees_in_two_turns() -> None:
    alone = take(some_batches(dropout=0.3, accumulation=2), 8)
    by_rank = [take(some_batches(dropout=0.3, ranks=OneOf(rank, 2)), 8) for rank in range(2)]
    for whole, *parts in zip(alone, *by_rank, strict=True):
        shared = [batch for part in parts for batch in part.batches]
        assert [part.after for part in parts] == [whole.after] * 2
        assert [(b.micro, b.slot, b.slots, texts(b)) for b in shared] == [
            (b.micro, b.slot, b.slots, texts(b)) for b in whole.batches
        ]


def test_another_seed_tells_other_captions() -> None:
    left, right = Prompts(), Prompts()
    take(some_batches(seed=1, prompts=left), 20)
    take(some_batches(seed=2, prompts=right), 20)
    assert left.asked[:30] != right.asked[:30]


def test_what_fails_in_the_thread_is_raised_where_batches_are_asked_for() -> None:
    class Torn(Latents):
        def get(self, sample: int) -> Tensor:
            if sample == 5:
                raise RuntimeError("torn latents")
            return super().get(sample)

    with pytest.raises(RuntimeError, match="torn latents"):
        take(some_batches(latents=[Torn(), Latents()]), 50)
    assert threads() == []


def test_the_thread_ends_when_the_consumer_stops_early() -> None:
    groups = some_batches().groups(Cursor())
    next(groups)
    assert len(threads()) == 1
    groups.close()
    assert threads() == []


def test_a_few_groups_are_read_ahead_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "AHEAD", 2)
    prompts = Prompts()
    with closing(some_batches(prompts=prompts).groups(Cursor())) as groups:
        next(groups)
        time.sleep(0.1)
        read = len(prompts.asked)
        assert 2 * 3 <= read <= 3 * 3, "the one in hand and two more, of two or three samples"
        time.sleep(0.1)
        assert len(prompts.asked) == read


def test_batches_of_real_caches_are_what_was_encoded(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, Recipe("vae", {}))
    with cache.writer(4) as writer:
        writer.add([(item_key(n), {"latents": torch.full((2, 4, 4), n + 0.5).half()}) for n in range(7)])
    store = LatentStore(cache, np.array([item_key(n).encode() for n in range(7)], KEY_DTYPE))

    class Letters(Prompts):
        recipe = Recipe("letters", {})

        def lent(self, device: str) -> Any:
            return nullcontext(lambda prompts: [self.get(prompt) for prompt in prompts])

    images = Pictures("cats")
    images.alive = lambda: np.arange(7)  # type: ignore[attr-defined]
    prompts = PromptStore(tmp_path, [Letters.recipe], write_batch_size=8, text_encoder_batch_size=4)
    prompts.fill(Letters(), training_prompts([images]), device="cpu", ranks=Alone(), tell=lambda event: None)  # type: ignore[list-item]
    stream = Stream([PlanSet(np.arange(7), np.arange(7) % 2, BUCKETS, batch_size=2)], 1)
    batches = some_batches(stream=stream, sets=[images], latents=[store], prompts=prompts, dropout=0.3)
    for group in take(batches, 12):
        [batch] = group.batches
        assert (batch.latents_BCHW[:, 0, 0, 0] - 0.5).tolist() == list(batch.micro.ids)
        for sample, text in zip(batch.micro.ids, texts(batch), strict=True):
            assert text == "uncond" or text.startswith(f"cond cats {sample} ")
