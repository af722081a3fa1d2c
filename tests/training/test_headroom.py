from __future__ import annotations

from dataclasses import dataclass

import pytest

from simpletuner.training.headroom import Headroom


@dataclass
class Card:
    peak_gib: float | None
    all_gib: float | None = 80.0

    def peak_memory_gib(self) -> float | None:
        return self.peak_gib

    def memory_gib(self) -> float | None:
        return self.all_gib


@pytest.mark.parametrize(("peak_gib", "is_told"), [(0.0, False), (76.0, False), (76.1, True)])
def test_a_peak_above_95_of_a_hundred_of_the_card_is_told(peak_gib: float, is_told: bool) -> None:
    warning = Headroom(Card(peak_gib)).warning()
    assert bool(warning) is is_told
    assert not is_told or "76.1 GiB of the card's 80.0 (95%)" in warning


def test_it_is_told_once_and_as_soon_as_it_is_so() -> None:
    card = Card(10.0)
    headroom = Headroom(card)
    assert headroom.warning() == ""
    card.peak_gib = 79.0
    assert headroom.warning() != ""
    assert headroom.warning() == ""


@pytest.mark.parametrize("card", [Card(None), Card(1.0, None)])
def test_where_nothing_is_counted_nothing_is_said(card: Card) -> None:
    assert Headroom(card).share() is None
    assert Headroom(card).warning() == ""
