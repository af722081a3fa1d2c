from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.run import Run
from simpletuner.data.ranks import Alone
from simpletuner.errors import RunError
from simpletuner.events import Event, ResultReady
from simpletuner.families import find
from simpletuner.families.base import Shot
from simpletuner.preflight import Length
from simpletuner.publishing import publish

SHOT = Shot("cat", 0, "a \ud800 cat", "", 64, 64, seed=1, guidance=1.0, steps=2)


@pytest.fixture
def published(make_run: Callable[..., Run], tmp_path: Path) -> Callable[[bool], list[Event]]:
    """`is_new` -> what is told of a run in `tmp_path` that has ended."""
    run = replace(make_run("sana", output_dir=str(tmp_path)), sources=defaultdict(lambda: "core"))
    config: Any = defaultdict(lambda: None, data_backend_config=[])

    def published(is_new: bool) -> list[Event]:
        told: list[Event] = []
        length = Length(10, 5, 2)
        engine: Any = Alone()
        publish(run, engine, find()["sana"](run), [], [SHOT], config, length, None, told.append, step=10, is_new=is_new)
        return told

    return published


def test_a_card_that_could_not_be_written_is_written_by_the_next_start(
    published: Callable[[bool], list[Event]], tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    card.mkdir()  # stands for a full disk
    with pytest.raises(RunError, match=r"could not be written: .*\n.*start the same command again for the card"):
        published(True)
    card.rmdir()
    assert published(False) == [ResultReady({"README.md": card})]
    assert "10 optimiser steps" in card.read_text()


def test_a_card_stays_as_its_user_has_left_it_until_there_is_a_new_result(
    published: Callable[[bool], list[Event]], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("mine")
    published(False)
    assert (tmp_path / "README.md").read_text() == "mine"
    published(True)
    assert (tmp_path / "README.md").read_text() != "mine"
