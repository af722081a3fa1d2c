from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from simpletuner.events import Measured
from simpletuner.reporting.console import Console
from simpletuner.reporting.measured import measured_line
from simpletuner.reporting.metrics import MetricsFile

CURVE = [(0.25, 0.2), (0.75, math.nan)]


def test_an_eval_loss_is_told_with_the_bases_beside_it() -> None:
    stream = io.StringIO()
    Console(stream=stream)(Measured("eval", 100, {"eval_loss": 0.12344, "eval_loss_base": 0.15}))
    assert stream.getvalue() == "eval loss at step 100: 0.1234 (base 0.1500)\n"


def test_the_average_and_each_of_several_sets_are_told_too() -> None:
    figures = {"eval_loss": 0.2, "eval_loss/a/b": 0.1, "eval_loss/dogs": 0.3}
    figures |= {"eval_loss_ema": 0.19, "eval_loss_ema/a/b": 0.09, "eval_loss_ema/dogs": 0.29}
    line = "eval loss at step 7: 0.2000 (average 0.1900); a/b 0.1000 (average 0.0900); dogs 0.3000 (average 0.2900)"
    assert measured_line(Measured("eval", 7, figures)) == line


def test_a_clip_score_is_told_by_its_figures() -> None:
    figures = {"clip_score/mean": 28.134, "clip_score/min": 20.0}
    assert measured_line(Measured("clip", 7, figures)) == "CLIP score at step 7: mean 28.13, min 20.00"


@pytest.mark.parametrize(("weights", "whose"), [("ema", "the average"), ("base", "the base")])
def test_a_clip_score_says_whose_it_is(weights: str, whose: str) -> None:
    line = measured_line(Measured("clip", 7, {f"clip_score/{weights}/mean": 28.1}))
    assert line == f"CLIP score of {whose} at step 7: mean 28.10"


def test_a_measurement_is_a_row_of_its_kind_with_its_curves(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(Measured("eval", 100, {"eval_loss": 0.12}, {"eval_loss": CURVE}))
    sink.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("time").endswith("+00:00")
    assert row == {"kind": "eval", "step": 100, "eval_loss": 0.12, "curves": {"eval_loss": [[0.25, 0.2], [0.75, None]]}}
