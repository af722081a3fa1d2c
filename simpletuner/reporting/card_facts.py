"""What of a run its model card tells, and which files are uploaded with it.

Chosen by name: what is not listed here is not told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from simpletuner.config.datasets import ENTRIES
from simpletuner.config.effects import holds
from simpletuner.config.options import Option, options_of
from simpletuner.config.run import Run
from simpletuner.config.sections import SECTIONS
from simpletuner.reporting.model_card import CARD, DatasetFacts, Picture

__all__ = ["dataset_facts", "instance_prompt", "kind_of", "local_paths", "result_files", "told_settings"]

TOLD = ("model", "adapter", "training", "optimizer", "ema", "precision", "objective", "flow", "family")
"""Sections that say how the weights came about."""
TOLD_OF_DATASETS = (
    "resolution",
    "resolution_type",
    "bucket_resolutions",
    "crop",
    "crop_aspect",
    "crop_aspect_buckets",
    "crop_style",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "repeats",
    "probability",
    "is_regularisation_data",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "caption_shuffle",
)
MOST_BUCKETS = 20


def told_settings(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are no plain defaults, from the resolved configuration; no paths."""
    told = {}
    for option in _options(run):
        value = config[option.name]
        is_path = bool(option.path) and isinstance(value, str)
        if option.section in TOLD and run.sources[option.name] != "core" and value is not None and not is_path:
            told[option.name] = value
    return told


def dataset_facts(config: Mapping[str, Any], buckets: Mapping[str, Mapping[str, int]]) -> list[DatasetFacts]:
    """The image sets of the resolved configuration. `buckets`: id -> size -> pictures that were used."""
    conditions = {option.name: option.when for option in options_of("dataset", ENTRIES["image"])}
    found = []
    for entry in config["data_backend_config"]:
        if entry["id"] not in buckets:
            continue
        names = [name for name in TOLD_OF_DATASETS if entry.get(name) is not None and holds(conditions[name], entry)]
        sizes = sorted(buckets[entry["id"]].items(), key=lambda one: -one[1])
        shown = ", ".join(f"{size} ({count:,})" for size, count in sizes[:MOST_BUCKETS])
        more = f", and {len(sizes) - MOST_BUCKETS} more" if len(sizes) > MOST_BUCKETS else ""
        options = {**{name: entry[name] for name in names}, "buckets": shown + more}
        found.append(DatasetFacts(entry["id"], sum(buckets[entry["id"]].values()), options))
    return found


def instance_prompt(config: Mapping[str, Any]) -> str:
    """The words that call the subject, where a set says so."""
    entries = config["data_backend_config"]
    said = (entry.get("instance_prompt") for entry in entries if entry.get("caption_strategy") == "instanceprompt")
    return next((text for text in said if text), "")


def kind_of(run: Run) -> str:
    """ "LoRA", "LyCORIS" or "full fine-tune"."""
    if run.model.model_type == "full":
        return "full fine-tune"
    return "LyCORIS" if run.adapter.lora_type == "lycoris" else "LoRA"


def local_paths(run: Run) -> list[str]:
    """Whole paths of this machine among the options, and the home folder: nobody else needs to see them."""
    values = [str(value) for option in _options(run) if option.path and (value := _value(run, option)) is not None]
    return [value for value in (*values, str(Path.home())) if Path(value).is_absolute() or PureWindowsPath(value).drive]


def result_files(folder: Path, result: str, pictures: Sequence[Picture]) -> dict[str, Path]:
    """What is uploaded at the end, by place: weights, their average, card, configuration, and the pictures that the card shows.

    A whole pipeline's folder is laid out at the top, where `from_pretrained` looks for it.
    """
    files = {CARD: folder / CARD, "simpletuner_config.json": folder / "config.json"}
    files |= {picture.file: folder / picture.file for picture in pictures}
    if (folder / result).is_dir():
        files |= {path.relative_to(folder / result).as_posix(): path for path in _files(folder / result)}
        files |= {
            path.relative_to(folder).as_posix().replace(f"ema/{result}/", "ema/"): path for path in _files(folder / "ema")
        }
    else:
        beside = (folder / result, folder / "lycoris_config.json", *_files(folder / "ema"))
        files |= {path.relative_to(folder).as_posix(): path for path in beside}
    return {place: path for place, path in files.items() if path.is_file()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _options(run: Run) -> Iterator[Option]:
    for name, part in {**SECTIONS, "family": type(run.family)}.items():
        yield from options_of(name, part)


def _value(run: Run, option: Option) -> Any:
    return dict(dict(run.__dict__)[option.section])[option.name]
