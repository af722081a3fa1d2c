from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from simpletuner.events import Notice, Painted, Stepped
from simpletuner.reporting.metrics import MetricsFile


def stepped(step: int, loss: float = 0.5, **extra: float) -> Stepped:
    return Stepped(step, 100, 1, loss, 1e-4, 0.1, 33.0, "2026-11-20T07:00:00+00:00", extra)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_is_one_row_with_what_tools_rely_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = MetricsFile(path)
    sink(stepped(10, peak_memory_gib=1.5))
    assert rows(path) == [
        {
            "step": 10,
            "epoch": 1,
            "loss": 0.5,
            "learning_rate": 1e-4,
            "grad_norm": 0.1,
            "samples_per_s": 33.0,
            "time": "2026-11-20T07:00:00+00:00",
            "peak_memory_gib": 1.5,
        }
    ], "and it is there before the file is closed"
    sink.close()


def test_a_picture_is_a_row_of_its_own_kind_with_its_path_in_the_run_s_folder(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(Painted(tmp_path / "validation" / "a.png", "你好", "a cat", 10))
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["kind"], row["step"], row["nickname"], row["file"]) == ("validation", 10, "你好", "validation/a.png")
    sink.close()


def test_what_is_no_figure_is_no_row(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(Notice("hello"))
    sink.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for step in (10, 20):
        sink = MetricsFile(tmp_path / "metrics.jsonl")
        sink(stepped(step))
        sink.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [10, 20]


def test_a_line_that_was_cut_off_by_a_kill_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 2')
    sink = MetricsFile(path)
    sink(stepped(30))
    sink.close()
    first, cut_off, last = path.read_text().splitlines()
    assert (json.loads(first)["step"], cut_off, json.loads(last)["step"]) == (10, '{"step": 2', 30)


def test_nan_and_infinity_are_null_since_json_knows_neither(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(stepped(10, loss=math.nan, other=-math.inf))
    sink.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["loss"] is None
    assert row["other"] is None


def test_half_a_surrogate_in_a_prompt_is_written_as_json_has_it(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(Painted(tmp_path / "validation" / "a.png", "cat", "a \ud800 cat", 10))
    sink(stepped(11))
    sink.close()
    assert [row.get("prompt") for row in rows(tmp_path / "metrics.jsonl")] == ["a \ud800 cat", None]
