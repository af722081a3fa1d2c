from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.config.run import Run
from simpletuner.errors import UserError
from simpletuner.evaluation.clip_score import ClipScore, figures_of, judge_needs, verify_judge
from simpletuner.networks.attention import preferring
from tests.tiny_clip import build_clip, judged

Judging = Callable[..., Run]

PICTURES = [
    (Image.effect_noise((64, 48), 90), "a red cat"),
    (Image.linear_gradient("L").resize((40, 80)), "a blue dog " * 60),
    (Image.radial_gradient("L").resize((28, 28)).convert("RGBA"), ""),
]


@pytest.fixture
def judging(make_run: Callable[..., Run], tiny_clip: Path) -> Judging:
    def run(folder: Path = tiny_clip, prompt: str | None = "a cat") -> Run:
        judge = {"evaluation_type": "clip", "pretrained_evaluation_model_name_or_path": str(folder)}
        return make_run("sana", validation_prompt=prompt, **judge)

    return run


@pytest.mark.parametrize("mechanism", ["diffusers", "native-math", "sageattention"])
def test_scores_are_cosines_of_both_embeddings_whatever_attention_paints(
    judging: Judging, tiny_clip: Path, mechanism: str
) -> None:
    with preferring(mechanism):
        scores = ClipScore(judging()).scores(PICTURES, device="cpu")
    cosines = [judged(tiny_clip, image, prompt) for image, prompt in PICTURES]
    assert min(cosines) > 0, "another seed is needed"
    assert max(cosines) - min(cosines) > 5, "the tiny model judges all alike"
    assert scores == pytest.approx(cosines, abs=1e-3)


def test_a_picture_that_is_the_contrary_of_its_prompt_scores_nothing(judging: Judging, tmp_path: Path) -> None:
    build_clip(tmp_path, sign=-1)
    assert ClipScore(judging(tmp_path)).scores(PICTURES, device="cpu") == [0, 0, 0]


def test_figures_are_named_by_whose_weights_painted() -> None:
    assert figures_of([20.0, 30.0, 22.0], "trained") == {
        "clip_score/mean": 24.0,
        "clip_score/min": 20.0,
        "clip_score/max": 30.0,
    }
    assert set(figures_of([20.0], "base")) == {"clip_score/base/mean", "clip_score/base/min", "clip_score/base/max"}


def test_a_whole_judge_passes_and_none_is_asked_for_where_nothing_is_judged(
    judging: Judging, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    verify_judge(judging())
    verify_judge(make_run("sana", pretrained_evaluation_model_name_or_path=str(tmp_path), validation_prompt="a cat"))
    verify_judge(judging(tmp_path, None))
    assert [part for _, part in judge_needs(judging())] == [""]
    assert judge_needs(judging(tmp_path, None)) == [], "without a gallery none is fetched"


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ("model.safetensors", "lacks model.safetensors"),
        ("preprocessor_config.json", "lacks preprocessor_config.json"),
        ("config.json", "cannot be read"),
    ],
)
def test_a_judge_that_is_not_whole_is_found_before_any_work(
    judging: Judging, tiny_clip: Path, tmp_path: Path, absent: str, said: str
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    (tmp_path / "clip" / absent).unlink()
    with pytest.raises(UserError, match=said):
        verify_judge(judging(tmp_path / "clip"))


def test_a_judge_that_was_cut_short_is_found_too(judging: Judging, tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        verify_judge(judging(tmp_path / "clip"))


def test_another_kind_of_model_is_no_judge(judging: Judging, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="holds a bert, not a CLIP"):
        verify_judge(judging(tmp_path))
