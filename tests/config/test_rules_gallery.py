from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.rules_gallery import gallery_notices

Project = Any


def notices(project: Project, has_webhook: bool, **options: Any) -> str:
    project.options(**options)
    return "\n".join(gallery_notices(project.run(), has_webhook=has_webhook))


@pytest.mark.parametrize("has_webhook", [True, False])
def test_previews_that_are_off_are_not_spoken_of(project: Project, has_webhook: bool) -> None:
    assert notices(project, has_webhook) == ""


def test_previews_without_a_webhook_are_said_to_be_kept_in_the_folder(project: Project) -> None:
    wanted = {"validation_preview": True, "validation_prompt": "a cat", "output_dir": "out"}
    assert "out/previews" in notices(project, False, **wanted)
    assert any("out/previews" in line for line in project.run().notices)
    assert notices(project, True, **wanted) == ""


def test_previews_without_a_gallery_are_said_to_show_nothing(project: Project) -> None:
    assert "there is no gallery" in notices(project, True, validation_preview=True)
    assert notices(project, True, validation_preview=True, validation_prompt_library=True) == ""


def test_scores_without_a_gallery_are_said_to_score_nothing(project: Project) -> None:
    assert "`evaluation_type` scores nothing" in notices(project, False, evaluation_type="clip")
    assert notices(project, False, evaluation_type="clip", validation_prompt="a cat") == ""
