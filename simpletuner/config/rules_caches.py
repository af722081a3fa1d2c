"""What is wrong with how the entries of a dataset file refer to each other, and with when its caches are filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from simpletuner.config.datasets import ImageDataset
from simpletuner.config.run import Run
from simpletuner.config.spelling import nearest
from simpletuner.errors import Problem

__all__ = ["check"]

BOTH = "one writes nothing, the other fills the cache."
NOT_WRITTEN = ("core", "family", "derived")


def check(run: Run) -> Iterator[Problem]:
    """Contradictions between keys of the datasets."""
    text = run.text_embeds
    if text.text_cache_disable and text.text_cache_ondemand:
        what = f"Dataset `{text.id}`: `text_cache_disable` and `text_cache_ondemand` are both true."
        yield Problem(f"{text.id}.text_cache_ondemand", what, BOTH, "Set one of them to false.")
    for dataset in run.picture_sets:
        if dataset.vae_cache_disable and dataset.vae_cache_ondemand:
            what = f"Dataset `{dataset.id}`: `vae_cache_disable` and `vae_cache_ondemand` are both true."
            yield Problem(f"{dataset.id}.vae_cache_ondemand", what, BOTH, "Set one of them to false.")
        yield from _named(dataset, "image_embeds", dataset.image_embeds, [one.id for one in run.image_embeds])
        yield from _named(dataset, "text_embeds", dataset.text_embeds, [text.id])
        yield from _named(dataset, "conditioning_data", dataset.conditioning_data, [one.id for one in run.conditioning])
        yield from _two_places(run, dataset)
    yield from _defaults(run)
    yield from _unused(run)


def _named(dataset: ImageDataset, option: str, name: str | None, known: Iterable[str]) -> Iterator[Problem]:
    """An entry that is named must be there."""
    known = tuple(known)
    if name is None or name in known:
        return
    kind = "conditioning" if option == "conditioning_data" else option
    near = nearest(name, known)
    mend = f'Did you mean "{near}"?' if near else f'Add an entry with "id": "{name}" and "dataset_type": "{kind}".'
    what = f"Dataset `{dataset.id}`: `{option}` is `{name}`, and no enabled entry of the kind `{kind}` has that id."
    yield Problem(f"{dataset.id}.{option}", what, f"there is: {', '.join(known) or 'none'}.", mend)


def _two_places(run: Run, dataset: ImageDataset) -> Iterator[Problem]:
    """A set whose latents would have to be kept in two folders."""
    folder = next((one.cache_dir for one in run.image_embeds if one.id == dataset.image_embeds), None)
    is_written = run.sources.get(f"{dataset.id}.cache_dir_vae", "core") not in NOT_WRITTEN
    if folder is not None and is_written and folder != dataset.cache_dir_vae:
        what = (
            f"Dataset `{dataset.id}`: `cache_dir_vae` is {dataset.cache_dir_vae}, but `{dataset.image_embeds}` is in {folder}."
        )
        yield Problem(f"{dataset.id}.image_embeds", what, "latents are kept in one place.", "Remove one of the two keys.")


def _defaults(run: Run) -> Iterator[Problem]:
    defaults = [one.id for one in run.image_embeds if one.default]
    if len(defaults) > 1:
        what = f"{len(defaults)} entries of the kind `image_embeds` are `default`: {', '.join(defaults)}."
        yield Problem(f"{defaults[1]}.default", what, "a set that names none is kept in one of them.", "Keep one.")


def _unused(run: Run) -> Iterator[Problem]:
    used = {dataset.conditioning_data for dataset in run.datasets}
    for entry in run.conditioning:
        if entry.id not in used:
            what = f"Dataset `{entry.id}`: no set of pictures names these masks."
            mend = f'Add "conditioning_data": "{entry.id}" to the set that they belong to, or set "disabled" to true here.'
            yield Problem(f"{entry.id}.conditioning_type", what, "the whole pictures would be trained on.", mend)
