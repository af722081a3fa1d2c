from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.load import resolved

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


def entries(project: Project, *others: dict[str, Any], **keys: Any) -> None:
    project.datasets([{"id": "cats", "instance_data_dir": "datasets/pictures", **keys}, *others])


def place(name: str, **keys: Any) -> dict[str, Any]:
    return {"id": name, "dataset_type": "image_embeds", **keys}


def masks(name: str = "masks", **keys: Any) -> dict[str, Any]:
    return {"id": name, "dataset_type": "conditioning", "instance_data_dir": "datasets/pictures", **keys}


def test_latents_are_kept_where_a_set_says_else_in_the_default_place(project: Project) -> None:
    both = (place("a", cache_dir="there", write_batch_size=7), place("b", cache_dir="here", default=True))
    for keys, found in (
        ({"image_embeds": "a"}, ("there", 7)),
        ({"image_embeds": "a", "write_batch_size": 9}, ("there", 9)),
        ({}, ("here", 128)),
        ({"cache_dir_vae": "elsewhere"}, ("elsewhere", 128)),
    ):
        entries(project, *both, **keys)
        [cats] = project.run().datasets
        assert (cats.cache_dir_vae, cats.write_batch_size) == found


def test_a_place_without_a_folder_lies_in_the_output_folder(project: Project) -> None:
    entries(project, place("a"), image_embeds="a")
    assert project.run("output_dir=out").datasets[0].cache_dir_vae == "out/cache/vae/a"


def test_what_was_resolved_resolves_to_the_same(project: Project) -> None:
    entries(project, place("a", cache_dir="there"), masks(), image_embeds="a", conditioning_data="masks")
    first = project.run()
    project.datasets(resolved(first)["data_backend_config"])
    second = project.run()
    assert (second.datasets, second.image_embeds, second.conditioning) == (
        first.datasets,
        first.image_embeds,
        first.conditioning,
    )


@pytest.mark.parametrize(
    ("keys", "others", "said"),
    [
        ({"image_embeds": "lattents"}, [place("latents")], 'Did you mean "latents"?'),
        ({"image_embeds": "a"}, [], '"dataset_type": "image_embeds"'),
        ({"text_embeds": "other"}, [], "no enabled entry of the kind `text_embeds`"),
        ({"conditioning_data": "masks"}, [masks(disabled=True)], "no enabled entry of the kind `conditioning`"),
        ({"image_embeds": "a", "cache_dir_vae": "x"}, [place("a", cache_dir="y")], "latents are kept in one place"),
        ({}, [place("a", default=True), place("b", default=True)], "are `default`: a, b"),
        ({}, [masks()], "no set of pictures names these masks"),
        ({"conditioning_data": "masks"}, [masks(conditioning_type="depth")], "`conditioning_type` is"),
    ],
)
def test_entries_that_do_not_fit_together_are_told(
    project: Project, keys: dict[str, Any], others: list[dict[str, Any]], said: str
) -> None:
    entries(project, *others, **keys)
    assert said in project.problem()


def test_the_text_cache_may_be_named(project: Project) -> None:
    entries(project, {"id": "prompts", "dataset_type": "text_embeds"}, text_embeds="prompts")
    assert project.run().text_embeds.id == "prompts"


def test_nothing_is_written_among_the_masks(project: Project) -> None:
    (project.root / "datasets" / "masks").mkdir()
    entries(project, masks(instance_data_dir="datasets/masks"), conditioning_data="masks")
    assert "within the pictures of dataset `masks`" in project.problem("output_dir=datasets/masks/out")


def test_a_share_of_masks_without_masks_is_said_to_change_nothing(project: Project) -> None:
    entries(project, masks(), conditioning_data="masks")
    assert not any("no effect" in line for line in project.run("masked_loss_probability=0.5").notices)
    entries(project)
    assert any("`masked_loss_probability` has no effect" in line for line in project.run("masked_loss_probability=0.5").notices)
