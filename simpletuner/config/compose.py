"""Lays what the user wrote over the defaults: core < family < flavour < derived < written. Every value keeps its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config.datasets import (
    ENTRIES,
    ConditioningDataset,
    ImageDataset,
    ImageEmbedsDataset,
    TextEmbedsDataset,
)
from simpletuner.config.derive import Known, derive, derive_image, derive_image_embeds, derive_text_embeds, dtypes
from simpletuner.config.effects import without_effect
from simpletuner.config.entries import Entry
from simpletuner.config.layers import Given
from simpletuner.config.options import Section, options_of
from simpletuner.config.run import Hardware, Run
from simpletuner.config.sections import SECTIONS
from simpletuner.config.spelling import uses_environment
from simpletuner.config.vocabulary import FamilyFacts

__all__ = ["compose"]


@dataclass(frozen=True)
class Layered:
    """Values with their sources."""

    values: dict[str, Any]
    sources: dict[str, str]

    def over(self, values: Mapping[str, Any], source: str) -> Layered:
        """Another layer on top; names that are not declared below are not its business."""
        known = {name: value for name, value in values.items() if name in self.values}
        return Layered({**self.values, **known}, {**self.sources, **dict.fromkeys(known, source)})

    def given(self, given: Mapping[str, Given]) -> Layered:
        """What the user wrote, on top."""
        values = {name: one.value for name, one in given.items()}
        return Layered({**self.values, **values}, {**self.sources, **{name: one.source for name, one in given.items()}})


def _core(*sections: type[Section]) -> Layered:
    fields = {name: info for section in sections for name, info in section.model_fields.items()}
    return Layered(
        {name: None if info.is_required() else info.get_default() for name, info in fields.items()},
        dict.fromkeys(fields, "core"),
    )


def compose(
    family: FamilyFacts,
    given: Mapping[str, Given],
    entries: Sequence[Entry],
    hardware: Hardware,
    config_path: Path | None,
    notices: Sequence[str],
) -> Run:
    """The run as asked for; whether it makes sense is for the rules to say."""
    parts = {**SECTIONS, "family": family.Options}
    layers = (
        _core(*parts.values()).over(family.defaults, "family").over(_flavour_defaults(family, given), "flavour").given(given)
    )
    derived = derive(Known(layers.values, given.keys(), family), hardware)
    layers = layers.over(derived.values, "derived")
    values = layers.values
    built: dict[str, Any] = {
        name: part.model_validate({key: values[key] for key in part.model_fields}) for name, part in parts.items()
    }
    options = [option for name, part in parts.items() for option in options_of(name, part)]
    idle = without_effect(options, given, values)
    output_dir = values["output_dir"]
    embeds = [_plain_entry(entry, output_dir) for entry in entries if entry.kind == "image_embeds"]
    masks = [_plain_entry(entry, output_dir) for entry in entries if entry.kind == "conditioning"]
    images = [_dataset(entry, family, output_dir, embeds) for entry in entries if entry.kind == "image"]
    judged = values["num_eval_images"]
    evals = [_dataset(entry, family, output_dir, embeds, at_most=judged) for entry in entries if entry.kind == "eval"]
    text = _dataset(_text_entry(entries), family, output_dir)
    datasets = [*images, *evals, *masks, *embeds, text]
    return Run(
        **built,
        datasets=tuple(ImageDataset.model_validate(one.layers.values) for one in images),
        eval_datasets=tuple(ImageDataset.model_validate(one.layers.values) for one in evals),
        text_embeds=TextEmbedsDataset.model_validate(text.layers.values),
        image_embeds=tuple(ImageEmbedsDataset.model_validate(one.layers.values) for one in embeds),
        conditioning=tuple(ConditioningDataset.model_validate(one.layers.values) for one in masks),
        dtypes=dtypes(values, keeps_float32=family.keeps_float32),
        has_tiles=family.has_tiles,
        hardware=hardware,
        sources={**layers.sources, **{key: source for one in datasets for key, source in one.sources().items()}},
        written={**_written(given), **{key: text for one in datasets for key, text in one.written().items()}},
        notices=(*notices, *derived.notices, *idle, *(line for one in datasets for line in one.idle)),
        config_path=config_path,
    )


def _flavour_defaults(family: FamilyFacts, given: Mapping[str, Given]) -> Mapping[str, Any]:
    """What the chosen checkpoint wants otherwise than its family: found by its name, or by its repository's."""
    written = {name: given[name].value for name in ("pretrained_model_name_or_path", "model_flavour") if name in given}
    if path := written.get("pretrained_model_name_or_path"):
        return next((flavour.defaults for flavour in family.flavours.values() if flavour.repository == path), {})
    flavour = family.flavours.get(written.get("model_flavour") or family.default_flavour)
    return flavour.defaults if flavour else {}


@dataclass(frozen=True)
class Dataset:
    """An entry over its defaults."""

    entry: Entry
    layers: Layered
    idle: tuple[str, ...]

    @property
    def id(self) -> str:
        """Its name."""
        return self.layers.values["id"]

    def sources(self) -> dict[str, str]:
        """Where its values came from, by "<id>.<key>"."""
        return {f"{self.id}.{key}": source for key, source in self.layers.sources.items()}

    def written(self) -> dict[str, Any]:
        """Those that hold `{env:NAME}`, by "<id>.<key>"."""
        return {f"{self.id}.{key}": value for key, value in _written(self.entry.given).items()}


def _plain_entry(entry: Entry, output_dir: str) -> Dataset:
    """An entry to which a family adds nothing."""
    part = ENTRIES[entry.kind]
    layers = _core(part).given(entry.given)
    derived = derive_image_embeds(layers.values, output_dir) if entry.kind == "image_embeds" else {}
    return Dataset(entry, layers.over(derived, "derived"), ())


def _dataset(
    entry: Entry, family: FamilyFacts, output_dir: str, embeds: Sequence[Dataset] = (), *, at_most: int | None = None
) -> Dataset:
    """`at_most` so many of its pictures are used, unless it says fewer itself."""
    part = ENTRIES[entry.kind]
    layers = _core(part).over(family.defaults, "family").given(entry.given)
    if entry.kind == "eval":  # one class with `image`, whose kind is the default
        layers = layers.over({"dataset_type": entry.kind}, layers.sources["id"])
    own = layers.values.get("max_num_samples")
    if at_most is not None and (own is None or own > at_most):
        layers = layers.over({"max_num_samples": at_most}, "derived")
    layers = layers.over(_of_named_cache(layers, embeds), "derived")
    derived = (derive_text_embeds if entry.kind == "text_embeds" else derive_image)(layers.values, output_dir)
    layers = layers.over(derived, "derived")
    idle = without_effect(options_of("dataset", part), entry.own, layers.values)
    return Dataset(entry, layers, tuple(f"Dataset `{layers.values['id']}`: {line}" for line in idle))


def _of_named_cache(layers: Layered, embeds: Sequence[Dataset]) -> Mapping[str, Any]:
    """What the place says in which a set's latents are kept, as far as the set does not say it itself."""
    name, own = layers.values.get("image_embeds"), layers.values.get("cache_dir_vae")
    for one in embeds:
        place = one.layers.values
        if place["id"] == name or (name is None and own is None and place["default"]):
            said = {"cache_dir_vae": place["cache_dir"], "write_batch_size": place["write_batch_size"]}
            return {key: value for key, value in said.items() if layers.sources[key] in ("core", "family")}
    return {}


def _text_entry(entries: Sequence[Entry]) -> Entry:
    return next((entry for entry in entries if entry.kind == "text_embeds"), Entry("text_embeds", {}, frozenset(), True))


def _written(given: Mapping[str, Given]) -> dict[str, Any]:
    return {name: one.written for name, one in given.items() if uses_environment(one.written)}
