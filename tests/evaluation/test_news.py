from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.evaluation.files import Account
from simpletuner.evaluation.news import PictureNews
from simpletuner.events import Event, Notice, Painted

EVENTS = [Painted(Path("pictures") / f"{number}.png", "cat", "a cat", 10) for number in range(4)]
PATHS = [str(event.path) for event in EVENTS]


@pytest.fixture
def news() -> PictureNews:
    news = PictureNews()
    news.expect(EVENTS)
    return news


@pytest.fixture
def told() -> list[Event]:
    return []


def account(*, written: list[str] = [], waiting: list[str] = [], lost: list[str] = [], reason: str = "") -> Account:  # noqa: B006
    return Account(written, waiting, lost, reason)


def texts(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Notice) and event.level == "warning"]


def test_pictures_of_all_ranks_are_told_once_in_the_order_of_the_shots(news: PictureNews, told: list[Event]) -> None:
    news.tell_painted([account(written=[PATHS[2], PATHS[0]]), account(written=[PATHS[1]])], told.append)
    news.tell_painted([account(), account(written=[PATHS[3]])], told.append)
    assert told == EVENTS


def test_what_waits_on_any_rank_is_named_in_order_with_its_reason(news: PictureNews, told: list[Event]) -> None:
    accounts = [account(), account(waiting=[PATHS[3], PATHS[1]], reason="No space left")]
    news.tell_unwritten(accounts, told.append, is_last=False)
    (warning,) = texts(told)
    assert warning.startswith("2 pictures of pictures (1.png, 3.png) could not be written: No space left.")
    assert "kept in memory" in warning
    news.tell_painted([account(written=[PATHS[3]]), account()], told.append)
    assert told[1:] == [EVENTS[3]], "it is told once there is room"


def test_what_is_lost_is_told_apart_from_what_is_kept(news: PictureNews, told: list[Event]) -> None:
    accounts = [account(lost=[PATHS[0]], waiting=PATHS[1:3], reason="full"), account(lost=[PATHS[3]], reason="full")]
    news.tell_unwritten(accounts, told.append, is_last=False)
    lost, kept = texts(told)
    assert "0.png, 3.png" in lost
    assert "start the same command again" not in lost
    assert "1.png, 2.png" in kept


def test_a_picture_that_never_found_room_is_told_as_lost_with_the_mend(news: PictureNews, told: list[Event]) -> None:
    news.tell_unwritten([account(lost=[PATHS[1]], reason="full")], told.append, is_last=True)
    (warning,) = texts(told)
    assert "1 picture of pictures (1.png) could not be written and is lost: full." in warning
    assert "start the same command again" in warning


def test_more_than_a_handful_are_counted(told: list[Event]) -> None:
    many = [Painted(Path("pictures") / f"{number}.png", "cat", "a cat", 10) for number in range(7)]
    news = PictureNews()
    news.expect(many)
    news.tell_unwritten([account(waiting=[str(event.path) for event in many], reason="full")], told.append, is_last=False)
    assert "(0.png, 1.png, 2.png, 3.png, 4.png and 2 more)" in texts(told)[0]
