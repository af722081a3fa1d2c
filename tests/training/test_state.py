from __future__ import annotations

from simpletuner.data.samples import Cursor
from simpletuner.training.state import TrainState


def test_what_is_written_of_a_state_brings_all_of_it_back() -> None:
    state = TrainState()
    state.advance(Cursor(2, 7, 1), samples=8)
    again = TrainState()
    again.restore(state.as_json())
    assert again == state
    assert again.cursor.step == again.step == 1
