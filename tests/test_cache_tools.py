"""Cache tools over the caches of a tiny Sana, filled as a run fills them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.cache_sweep import sweep
from simpletuner.cache_tools import Caches, caches_of, verify, why
from simpletuner.config.datasets import ConditioningDataset, ImageDataset, TextEmbedsDataset
from simpletuner.config.run import Run
from simpletuner.data.cache import TensorCache
from simpletuner.data.masks import fill_masks
from simpletuner.data.precompute import fill_latents
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Recipe
from simpletuner.data.stores.urls import Urls
from simpletuner.errors import DataError, RunError, UserError
from simpletuner.events import Event
from simpletuner.families import load as load_family
from simpletuner.preflight import open_sets
from simpletuner.text_cache import fill
from simpletuner.training.staging import locked

PICTURES = 5


def silent(event: Event) -> None:
    """Hears everything."""


@pytest.fixture
def run(make_run: Callable[..., Run], tmp_path: Path) -> Run:
    """A run whose caches are filled, in shards of two."""
    (tmp_path / "cats").mkdir()
    for number in range(PICTURES):
        Image.new("RGB", (160, 128), (40 * number, 90, 40)).save(tmp_path / "cats" / f"cat {number}.png")
    entry = ImageDataset(
        id="cats", instance_data_dir=str(tmp_path / "cats"), cache_dir_vae=str(tmp_path / "vae"), resolution=128, crop=True,
        vae_batch_size=2, write_batch_size=2,
    )  # fmt: skip
    text = TextEmbedsDataset(cache_dir=str(tmp_path / "text"))
    run = make_run("sana", output_dir=str(tmp_path / "output"), validation_seed=1)
    run = replace(run, datasets=(entry,), text_embeds=text)
    family = load_family(run)
    sets = open_sets(run, family.latent, Alone(), silent)
    fill_latents(sets, family.image_encoder(), dtype=run.dtypes.latents, device="cpu", ranks=Alone(), tell=silent)
    return run


def with_set(run: Run, **keys: Any) -> Run:
    return replace(run, datasets=(run.datasets[0].model_copy(update=keys),))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("shard-*.safetensors"))


def latents_of(caches: Caches) -> Recipe:
    recipe = next(kept.recipe for kept in caches.pictures if kept.kind == "pictures")
    assert recipe is not None
    return recipe


def items(run: Run) -> dict[str, bytes]:
    """Every item of the run's latents."""
    caches = caches_of(run, silent)
    cache = TensorCache(caches.sets[0].cache_dir, latents_of(caches))
    return {key: cache.get(key)["latents"].numpy().tobytes() for key in cache.keys()}  # noqa: SIM118 (no mapping)


def test_why_tells_what_is_there_and_what_changed(run: Run, tmp_path: Path) -> None:
    [line, _] = why(caches_of(run, silent), "cat 1.png")
    assert line.startswith("latents of cats/cat 1.png: there")
    assert why(caches_of(run, silent), str(tmp_path / "cats" / "cat 1.png"))[0] == line
    moved = why(caches_of(with_set(run, crop_style="corner"), silent), "cat 1")
    assert moved[0] == "latents of cats/cat 1.png: will be made: crop changed."
    Image.new("RGB", (160, 128), (1, 2, 3)).save(tmp_path / "cats" / "cat 1.png")
    Image.new("RGB", (160, 128), (1, 2, 3)).save(tmp_path / "cats" / "dog.png")
    caches = caches_of(run, silent)
    assert [why(caches, name)[0].rpartition(": ")[2] for name in ("cat 1", "dog")] == ["picture changed.", "new."]
    other = caches_of(replace(run, dtypes=replace(run.dtypes, latents="float16")), silent)
    told = why(other, "cat 2.png")
    assert told[0].endswith("will be made: encoder changed.")
    assert told[-2].endswith('stored was "float32", now "float16"')


def test_why_answers_for_prompts_and_for_what_is_left_out(run: Run, tmp_path: Path) -> None:
    fill(run, device="cpu", ranks=Alone(), tell=silent)
    assert "gemma: there" in why(caches_of(run, silent), "cat 3")[-1]
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "speck.png")
    told = replace(run, family=type(run.family)(sana_complex_human_instruction="None"))
    caches = caches_of(told, silent)
    lines = why(caches, "cat 3")
    assert any("gemma: will be made" in line for line in lines)
    assert any("instruction was" in line and 'now ""' in line for line in lines)
    assert why(caches, "speck.png") == ["cats/speck.png is left out: too small 8x8: the shorter side is under 16 px"]
    with pytest.raises(DataError, match="No set has a picture `nothing`"):
        why(caches, "nothing")


def test_verify_reads_all_and_names_each_damaged_shard(run: Run, tmp_path: Path) -> None:
    latents, prompts = verify(caches_of(run, silent))
    assert latents.endswith("(dc-ae): 5 items, 0 damaged shards")
    assert prompts.endswith("(gemma): 6 of 6 will be made (again)")
    cut, spoilt, _ = shards(tmp_path / "vae")
    os.truncate(cut, cut.stat().st_size - 4)
    with spoilt.open("r+b") as file:  # a header in order, and numbers that are none
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)
    with pytest.raises(RunError, match="2 shards are damaged") as caught:
        verify(caches_of(run, silent))
    assert str(cut) in str(caught.value)
    assert f"{spoilt}: " in str(caught.value)
    assert "not finite" in str(caught.value)
    assert "2 of 5 will be made (again)" in str(caught.value)


def test_a_sweep_merges_small_shards_and_drops_what_is_unused_without_touching_a_bit(run: Run, tmp_path: Path) -> None:
    before, pictures = items(run), sorted(path.stat() for path in (tmp_path / "cats").iterdir())
    (shards(tmp_path / "vae")[0].parent / "shard-1.safetensors.broken").write_bytes(b"spoilt")
    (tmp_path / "cats" / "cat 4.png").unlink()
    wide = with_set(run, write_batch_size=8)
    would = sweep(wide, silent, is_dry=True, with_other_recipes=False)
    assert items(wide) == before, "a dry run changes nothing"
    swept = sweep(wide, silent, is_dry=False, with_other_recipes=False)
    assert would.dropped == swept.dropped
    assert swept.dropped == {"unused items": 1, "shards merged or rewritten": 3, "files set aside as .broken": 1}
    assert swept.after_bytes < swept.before_bytes
    after = items(wide)
    assert len(after) == 4
    assert after.items() <= before.items()
    assert len(shards(tmp_path / "vae")) == 1
    assert not list(tmp_path.rglob("*.broken"))
    assert pictures[:4] == sorted(path.stat() for path in (tmp_path / "cats").iterdir()), "pictures are only read"
    assert "nothing to do" in sweep(wide, silent, is_dry=False, with_other_recipes=False).text


def test_a_duplicate_goes_and_a_shard_that_holds_all_already_stays(run: Run, tmp_path: Path) -> None:
    """The merged shard's name is that of its keys: one of the old ones may bear it."""
    caches, before = caches_of(run, silent), items(run)
    cache = TensorCache(caches.sets[0].cache_dir, latents_of(caches))
    with cache.writer(100) as writer:
        writer.add([(key, cache.get(key)) for key in before])
    swept = sweep(with_set(run, write_batch_size=20), silent, is_dry=False, with_other_recipes=False)
    assert swept.dropped["duplicates"] == PICTURES
    assert items(run) == before
    assert len(shards(tmp_path / "vae")) == 1


def test_other_recipes_go_only_when_asked_for_and_strange_folders_never(run: Run, tmp_path: Path) -> None:
    strange = tmp_path / "vae" / "0123456789abcdef"
    strange.mkdir()
    (strange / "mine.txt").write_text("keep")
    half = replace(run, dtypes=replace(run.dtypes, latents="float16"))
    kept = len(shards(tmp_path / "vae"))
    sweep(half, silent, is_dry=False, with_other_recipes=False)
    assert len(shards(tmp_path / "vae")) == kept
    swept = sweep(half, silent, is_dry=False, with_other_recipes=True)
    assert swept.dropped["folders of other recipes"] == 1
    assert not shards(tmp_path / "vae")
    assert (strange / "mine.txt").is_file()


def test_nothing_is_swept_while_a_run_holds_the_folder(run: Run) -> None:
    with locked(Path(run.checkpointing.output_dir), Alone(), silent), pytest.raises(UserError, match="in use by another run"):
        sweep(run, silent, is_dry=False, with_other_recipes=True)


def filled(run: Run) -> None:
    """Latents of all sets, as a run makes them."""
    family = load_family(run)
    sets = open_sets(run, family.latent, Alone(), silent)
    fill_latents(sets, family.image_encoder(), dtype=run.dtypes.latents, device="cpu", ranks=Alone(), tell=silent)


def test_masks_and_image_embeds_of_this_config_are_whole_known_and_never_swept(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    for folder in ("cats", "masks"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.new("RGB", (160, 128), (90 * number, 250, 9)).save(tmp_path / folder / f"{number}.png")
    entry = ImageDataset(
        id="cats", instance_data_dir=str(tmp_path / "cats"), cache_dir_vae=str(tmp_path / "vae"), resolution=128, crop=True,
        conditioning_data="masks",
    )  # fmt: skip
    held = entry.model_copy(update={"id": "held", "dataset_type": "eval", "conditioning_data": None})
    run = make_run(
        "stable_cascade", output_dir=str(tmp_path / "output"), stable_cascade_image_embed_probability=0.5, validation_seed=1
    )
    run = replace(
        run, datasets=(entry,), eval_datasets=(held,), text_embeds=TextEmbedsDataset(cache_dir=str(tmp_path / "text")),
        conditioning=(ConditioningDataset(id="masks", instance_data_dir=str(tmp_path / "masks")),),
    )  # fmt: skip
    family = load_family(run)
    sets = open_sets(run, family.latent, Alone(), silent)
    fill_masks(sets[0], family.latent, ranks=Alone(), tell=silent)
    fill_latents(sets, family.image_encoder(), dtype="float32", device="cpu", ranks=Alone(), tell=silent)
    images = family.image_prompts()
    assert images is not None
    fill_latents(sets[:1], images[0], dtype="float32", device="cpu", ranks=Alone(), tell=silent, part="image embeds")

    caches = caches_of(run, silent)
    *held_lines, prompts = verify(caches)
    assert sorted(line.rpartition(" (")[2].partition(",")[0] for line in held_lines) == [
        "clip-l-image): 2 items",
        "effnet): 4 items",
        "mask): 2 items",
    ]
    assert prompts.startswith("prompts (clip-g)")
    told = why(caches, "cats/1.png")
    assert [line.partition(": there")[0] for line in told[:-1]] == [
        f"{what} of cats/1.png" for what in ("masks", "latents", "image embeds")
    ]
    swept = sweep(run, silent, is_dry=False, with_other_recipes=True)
    assert swept.dropped.keys() == {"shards merged or rewritten"}, "those of the two sets"
    assert verify(caches_of(run, silent)) == [*held_lines, prompts]


def test_a_set_that_is_left_out_for_now_keeps_what_it_has_in_a_shared_folder(run: Run, tmp_path: Path) -> None:
    other = run.datasets[0].model_copy(update={"id": "also", "resolution": 64.0})
    both = replace(run, eval_datasets=(other.model_copy(update={"dataset_type": "eval"}),))
    filled(both)
    before = items(both)
    swept = sweep(run, silent, is_dry=False, with_other_recipes=False)
    assert swept.dropped.keys() <= {"shards merged or rewritten"}
    assert "kept for a set that is not in this config" in swept.text
    assert "manifest-also.safetensors" in swept.text
    assert items(both) == before
    (tmp_path / "vae" / "manifest-also.safetensors").unlink()
    assert sweep(run, silent, is_dry=False, with_other_recipes=False).dropped["unused items"] == PICTURES


def test_one_folder_written_in_two_ways_is_one_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both = replace(run, datasets=(*run.datasets, run.datasets[0].model_copy(update={"id": "b", "cache_dir_vae": "./vae"})))
    filled(both)
    swept = sweep(both, silent, is_dry=False, with_other_recipes=True)
    assert swept.dropped["unused items"] == 0
    assert "will be made" not in "".join(line for line in verify(caches_of(both, silent)) if "pictures" in line)


def test_nothing_goes_while_a_picture_that_was_never_read_may_own_it(run: Run, tmp_path: Path) -> None:
    """As after a kill: its latents may be there already, while the manifest does not know yet."""
    (tmp_path / "cats" / "cat 4.png").unlink()
    Image.new("RGB", (160, 128), (7, 7, 7)).save(tmp_path / "cats" / "new.png")
    swept = sweep(run, silent, is_dry=False, with_other_recipes=False)
    assert swept.dropped["unused items"] == 0
    assert "kept: 1 items" in swept.text
    assert "1 pictures that were never read" in swept.text
    filled(run)
    assert sweep(run, silent, is_dry=False, with_other_recipes=False).dropped["unused items"] == 1


def test_what_has_no_cache_is_told_so_and_keeps_what_was_cached_before(run: Run) -> None:
    live = with_set(run, vae_cache_disable=True)
    live = replace(live, text_embeds=run.text_embeds.model_copy(update={"text_cache_disable": True}))
    caches = caches_of(live, silent)
    assert why(caches, "cat 1.png")[0] == "latents of cats/cat 1.png: made while training, and not cached."
    assert why(caches, "cat 1")[-1].endswith("gemma: made while training, and not cached.")
    assert "will be made" not in "".join(verify(caches))
    before = items(run)
    sweep(live, silent, is_dry=False, with_other_recipes=True)
    assert items(run) == before
    ondemand = with_set(run, vae_cache_ondemand=True, crop_style="corner")
    caches = caches_of(ondemand, silent)
    assert "pictures of cats: 5 of 5 will be made (again) while training" in verify(caches)
    assert why(caches, "cat 1.png")[0].endswith("will be made while training: crop changed.")


def test_a_picture_that_cannot_be_read_is_no_traceback(run: Run, tmp_path: Path) -> None:
    kept = with_set(run, preserve_data_backend_cache=True)
    (tmp_path / "cats" / "cat 1.png").unlink()
    assert why(caches_of(kept, silent), "cat 1.png") == [
        "cats/cat 1.png cannot be read: cannot be opened No such file or directory"
    ]


def test_pictures_of_a_list_of_urls_are_found_by_url(run: Run, tmp_path: Path) -> None:
    """They have no folder of their own; one is downloaded already, the other never will be."""
    url, dead = "http://127.0.0.1:9/a/cat.png?x=1", "http://127.0.0.1:9/gone.png"
    (tmp_path / "urls.csv").write_text(f"url,caption\n{url},a cat\n{dead},gone\n")
    web = run.datasets[0].model_copy(
        update={
            "type": "csv", "instance_data_dir": None, "csv_file": str(tmp_path / "urls.csv"), "caption_strategy": "csv",
            "csv_cache_dir": str(tmp_path / "web"), "cache_dir_vae": str(tmp_path / "web-vae"),
        }
    )  # fmt: skip
    path = Urls(web)._path(url)
    path.parent.mkdir(parents=True)
    Image.new("RGB", (160, 128), (9, 9, 200)).save(path)
    of_web = replace(run, datasets=(web,))
    filled(of_web)
    caches = caches_of(of_web, silent)
    assert why(caches, url)[0].startswith(f"latents of cats/{url}: there")
    assert "is left out: cannot be downloaded" in why(caches, dead)[0]
    assert "(dc-ae): 1 items, 0 damaged shards" in verify(caches)[0]
