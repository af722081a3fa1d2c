"""Every option there is, by name: those of the core, of each family, and the keys of a dataset entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from simpletuner.config.datasets import ENTRIES
from simpletuner.config.options import Option, Section, options_of
from simpletuner.config.run import Run
from simpletuner.config.sections import SECTIONS
from simpletuner.config.spelling import nearest
from simpletuner.errors import Problem

__all__ = ["PERSONAL", "FamilyFacts", "Vocabulary"]


class FamilyFacts(Protocol):
    """What the configuration needs to know of a family. Handed in: config may not import families."""

    title: str
    flavours: Mapping[str, Any]
    default_flavour: str
    defaults: Mapping[str, Any]
    keeps_float32: bool
    has_tiles: bool
    adapter_presets: Mapping[str, tuple[str, ...]]
    lycoris_presets: Mapping[str, tuple[str, ...]]
    keeps_attention: str
    Options: type[Section]

    def check(self, run: Run) -> Iterable[Problem]:
        """What is wrong with this run for this family."""
        ...

    def notices(self, run: Run) -> Iterable[str]:
        """What the user should know of this run with this family."""
        ...


PERSONAL = (
    *("id", "dataset_type", "type", "disabled", "default", "instance_data_dir", "parquet"),
    *("aws_bucket_name", "aws_data_prefix", "aws_region_name", "aws_endpoint_url"),
    *("aws_access_key_id", "aws_secret_access_key"),
    *("csv_file", "csv_url_column", "csv_caption_column", "csv_cache_dir", "csv_allow_private_addresses"),
    *("dataset_name", "split", "revision", "image_column", "caption_column"),
)
"""Keys that only an entry of its own can say; the other dataset keys may stand in the main config, as defaults."""


@dataclass(frozen=True)
class Vocabulary:
    """The options by canonical name."""

    core: Mapping[str, Option]
    families: Mapping[str, Mapping[str, Option]]
    entries: Mapping[str, Mapping[str, Option]]
    """dataset_type -> its keys."""
    synonyms: Mapping[str, str]
    """Other name -> name."""

    @classmethod
    def of(cls, families: Mapping[str, FamilyFacts]) -> Vocabulary:
        """The options of the core and of these families."""
        core = {o.name: o for section, part in SECTIONS.items() for o in options_of(section, part)}
        by_family = {name: {o.name: o for o in options_of("family", facts.Options)} for name, facts in families.items()}
        entries = {kind: {o.name: o for o in options_of("dataset", part)} for kind, part in ENTRIES.items()}
        every = [o for part in (core, *by_family.values(), *entries.values()) for o in part.values()]
        return cls(core, by_family, entries, {other: o.name for o in every for other in o.also})

    def anywhere(self, key: str) -> Option | None:
        """The option of this name, or other name, wherever it may be written."""
        name = self.synonyms.get(key, key)
        parts = (self.core, *self.families.values(), *self.entries.values())
        return next((part[name] for part in parts if name in part), None)

    def is_dataset_default(self, name: str) -> bool:
        """Whether it is a dataset's key that may stand in the main config, for all datasets. An option of the run's own that an
        entry may say otherwise (`train_batch_size`) stays the run's."""
        return name not in PERSONAL and name not in self.core and any(name in keys for keys in self.entries.values())

    def owners(self, name: str) -> list[str]:
        """The families that declare it."""
        return [family for family, options in self.families.items() if name in options]

    def in_main(self) -> set[str]:
        """Every name that the main config may say, of whichever family."""
        defaults = {name for keys in self.entries.values() for name in keys if self.is_dataset_default(name)}
        return {*self.core, *defaults, *(name for options in self.families.values() for name in options)}

    def near(self, key: str, names: Iterable[str]) -> str | None:
        """The name nearest to a mistyped one, by way of synonyms too."""
        known = {name: name for name in names}
        known.update({other: name for other, name in self.synonyms.items() if name in known})
        found = nearest(key, known)
        return known[found] if found else None
