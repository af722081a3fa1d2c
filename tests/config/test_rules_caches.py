from __future__ import annotations

from typing import Any

import pytest

Project = Any


def test_keys_of_caches_stand_in_an_entry_or_for_all_in_the_main_config(project: Project) -> None:
    project.dataset()
    run = project.run("--vae_cache_disable", "--text_cache_ondemand")
    assert (run.datasets[0].vae_cache_disable, run.text_embeds.text_cache_ondemand) == (True, True)


@pytest.mark.parametrize("kind", ["vae", "text"])
def test_to_write_nothing_and_to_fill_a_cache_are_two_wishes(project: Project, kind: str) -> None:
    project.dataset()
    assert f"`{kind}_cache_disable` and `{kind}_cache_ondemand` are both true" in project.problem(
        f"--{kind}_cache_disable", f"--{kind}_cache_ondemand"
    )
