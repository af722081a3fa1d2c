"""Uploads and trackers: what is told before any work."""

from __future__ import annotations

import importlib.util
from typing import Any

import huggingface_hub.constants
import pytest

Project = Any


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")


@pytest.mark.usefixtures("logged_in")
def test_with_a_login_the_repository_is_named_after_the_run_s_folder(project: Project) -> None:
    project.options(push_to_hub=True, output_dir="out/My run--v2. (ä)")
    run = project.run()
    assert run.hub.hub_model_id == "My-run-v2"
    assert run.hub.model_card_private


def test_without_a_login_uploads_are_refused_with_the_command(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(project.root / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    project.options(push_to_hub=True)
    assert "hf auth login" in project.problem()


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("name", ["a/b/c", "two--dashes", "ünlaut", "-dash"])
def test_a_name_that_no_repository_can_bear_is_refused(project: Project, name: str) -> None:
    project.options(push_to_hub=True, hub_model_id=name)
    assert name in project.problem()
    project.options(hub_model_id=name)
    assert not project.run().hub.push_to_hub, "alone it uploads nothing, so it is not judged"


@pytest.mark.parametrize(
    ("written", "meant"), [("wandb, TensorBoard", ("tensorboard", "wandb")), ("none", ()), ("", ()), ("wandb", ("wandb",))]
)
def test_trackers_are_named_by_comma(project: Project, written: str, meant: tuple[str, ...]) -> None:
    project.options(report_to=written, tracker_run_name="mine")
    run = project.run()
    assert run.trackers.trackers == meant
    assert any("`tracker_run_name` has no effect" in notice for notice in run.notices) == ("wandb" not in meant)


@pytest.mark.parametrize("written", ["comet_ml", "wandb,none"])
def test_a_tracker_that_there_is_not_is_refused_with_those_that_there_are(project: Project, written: str) -> None:
    project.options(report_to=written)
    problem = project.problem()
    assert written in problem
    assert "tensorboard" in problem or "contradict" in problem


def test_wandb_that_is_not_installed_is_told_and_stops_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "tensorboard") else find(name))
    project.options(report_to="wandb")
    assert any("metrics.jsonl alone" in notice and "pip install" in notice for notice in project.run().notices)
    project.options(report_to="tensorboard")
    assert "pip install 'simpletuner[tensorboard]'" in project.problem()
