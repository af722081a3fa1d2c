"""The store of prompts: encoded once, in fixed batches, shared by ranks, the encoder left alone where nothing is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from simpletuner.data.prompts import UNCOND, PromptStore, training_prompts
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Embeds, Prompt, Recipe
from simpletuner.events import Event, Notice, Progress

PROMPTS = [UNCOND, *(Prompt(f"a picture of {n}") for n in range(6))]


class Letters:
    """A text encoder: the code points of a prompt, and how many prompts it was encoded with."""

    def __init__(self, name: str = "letters", **facts: int) -> None:
        self.recipe = Recipe(name, facts)
        self.calls: list[list[str]] = []

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        assert device == "cpu"

        def encode(prompts: list[Prompt]) -> list[Embeds]:
            self.calls.append([prompt.text for prompt in prompts])
            return [
                {self.recipe.name: torch.tensor([len(prompt.role), *map(ord, prompt.text)]), "of": torch.tensor(len(prompts))}
                if self.recipe.name == "letters"
                else {self.recipe.name: torch.zeros(2, dtype=torch.bfloat16)}
                for prompt in prompts
            ]

        yield encode


class OneOf(Alone):
    """One rank of several, each filling in its turn: good enough where nobody waits for an answer."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks


def store(folder: Path, *encoders: Letters, write_batch_size: int = 4) -> PromptStore:
    recipes = [encoder.recipe for encoder in encoders]
    return PromptStore(folder, recipes, write_batch_size=write_batch_size, text_encoder_batch_size=3)


def fill(prompts: PromptStore, encoder: Letters, wanted: list[Prompt], ranks: Alone | None = None) -> list[Event]:
    told: list[Event] = []
    prompts.fill(encoder, wanted, device="cpu", ranks=ranks or Alone(), tell=told.append)
    return told


def test_a_prompt_is_told_apart_by_text_and_role_and_found_again(tmp_path: Path) -> None:
    encoder = Letters()
    fill(store(tmp_path, encoder), encoder, [Prompt("a"), UNCOND, Prompt(""), Prompt("ä 猫")])
    found = store(tmp_path, encoder)
    assert found.get(Prompt("a"))["letters"].tolist() == [4, 97]
    assert found.get(UNCOND)["letters"].tolist() == [6]
    assert found.get(Prompt(""))["letters"].tolist() == [4]
    assert found.get(Prompt("ä 猫"))["letters"].tolist() == [4, 228, 32, 29483]


def test_prompts_are_encoded_once_in_the_order_they_first_come_in_batches_of_the_size_asked_for(tmp_path: Path) -> None:
    encoder = Letters()
    fill(store(tmp_path, encoder), encoder, [Prompt(text) for text in ("b", "a", "b", "d", "a", "c", "e")])
    assert encoder.calls == [["b", "a", "d"], ["c", "e"]]


def test_the_encoder_is_not_even_called_where_nothing_is_missing(tmp_path: Path) -> None:
    fill(store(tmp_path, Letters()), Letters(), PROMPTS)
    encoder = Letters()
    told = fill(store(tmp_path, encoder), encoder, PROMPTS)
    assert encoder.calls == []
    assert told == [Notice("prompts (letters): 7 reused")]


def test_only_what_is_missing_is_encoded_and_said(tmp_path: Path) -> None:
    fill(store(tmp_path, Letters()), Letters(), PROMPTS[:4])
    encoder = Letters()
    prompts = store(tmp_path, encoder)
    assert prompts.missing(encoder.recipe, [*PROMPTS, *PROMPTS]) == PROMPTS[4:]
    told = fill(prompts, encoder, PROMPTS)
    assert sorted(text for call in encoder.calls for text in call) == [prompt.text for prompt in PROMPTS[4:]]
    assert told[-1] == Notice("prompts (letters): 4 reused, 3 encoded")
    assert prompts.missing(encoder.recipe, PROMPTS) == []


def test_a_changed_encoder_finds_nothing_of_the_old_one(tmp_path: Path) -> None:
    fill(store(tmp_path, Letters(length=77)), Letters(length=77), PROMPTS)
    longer = Letters(length=154)
    assert store(tmp_path, longer).missing(longer.recipe, PROMPTS) == PROMPTS


def test_progress_is_told_with_totals_to_the_end(tmp_path: Path) -> None:
    encoder = Letters()
    told = fill(store(tmp_path, encoder), encoder, PROMPTS)
    progress = [(event.done, event.total) for event in told if isinstance(event, Progress)]
    assert progress == [(0, 7), (3, 7), (6, 7), (7, 7)]


def test_the_embeds_of_several_encoders_come_together(tmp_path: Path) -> None:
    letters, zeros = Letters(), Letters("zeros")
    prompts = store(tmp_path, letters, zeros)
    for encoder in (letters, zeros):
        fill(prompts, encoder, PROMPTS)
    assert prompts.get(PROMPTS[1]).keys() == {"letters", "of", "zeros"}
    assert prompts.get(PROMPTS[1])["zeros"].dtype == torch.bfloat16


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_the_batches_and_together_make_what_one_would(tmp_path: Path, ranks: int) -> None:
    alone = Letters()
    expected = store(tmp_path / "alone", alone)
    fill(expected, alone, PROMPTS)
    encoders = [Letters() for _ in range(ranks)]
    stores = [store(tmp_path / "shared", encoder) for encoder in encoders]  # all open before anyone writes
    for rank, encoder in enumerate(encoders):
        fill(stores[rank], encoder, PROMPTS, OneOf(rank, ranks))
    assert sorted(call for encoder in encoders for call in encoder.calls) == sorted(alone.calls)
    for found in (stores[-1], store(tmp_path / "shared", alone)):  # the last to fill sees what the others did
        for prompt in PROMPTS:
            for name, tensor in expected.get(prompt).items():
                assert torch.equal(found.get(prompt)[name], tensor)


def test_what_was_encoded_before_an_error_is_kept(tmp_path: Path) -> None:
    class Stumbles(Letters):
        @contextmanager
        def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
            with super().lent(device) as encode:
                yield lambda prompts: encode(prompts) if len(self.calls) < 2 else 1 / 0  # type: ignore[return-value]

    with pytest.raises(ZeroDivisionError):
        fill(store(tmp_path, Letters(), write_batch_size=100), Stumbles(), PROMPTS)
    encoder = Letters()
    assert store(tmp_path, encoder).missing(encoder.recipe, PROMPTS) == PROMPTS[6:]


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    fill(store(tmp_path, Letters()), Letters(), PROMPTS)
    victim = min(tmp_path.glob("*/shard-*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    encoder = Letters()
    prompts = store(tmp_path, encoder)
    told = fill(prompts, encoder, PROMPTS)
    assert encoder.calls
    assert any(isinstance(event, Notice) and "set aside" in event.text for event in told)
    assert all(prompts.get(prompt)["of"] for prompt in PROMPTS)


def test_training_asks_for_a_dropped_caption_and_all_captions_of_usable_pictures() -> None:
    class Set:
        def alive(self) -> torch.Tensor:
            return torch.tensor([0, 2])

        def captions(self, sample: int) -> tuple[str, ...]:
            return (f"first of {sample}", f"second of {sample}")

    wanted = [UNCOND, *map(Prompt, ["first of 0", "second of 0", "first of 2", "second of 2"])]
    assert list(training_prompts([Set()])) == wanted  # type: ignore[list-item]
