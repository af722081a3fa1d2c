from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.app import record
from simpletuner.config.run import Run
from simpletuner.errors import RunError


def test_a_record_that_cannot_be_written_stops_the_run_with_its_mend(make_run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()  # stands for a full disk
    with pytest.raises(RunError, match=r"record in .* could not be written: .*\n.*make room there"):
        record(make_run("sana"), tmp_path, [], {})
