"""A run as plain values again: what is saved beside its results, and what may be shown of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.config.layers import show
from simpletuner.config.options import Section
from simpletuner.config.run import Run
from simpletuner.config.secrets import masked
from simpletuner.config.sections import SECTIONS

__all__ = ["changes", "explain", "flat", "resolved"]

LAYERS = ("core", "family", "flavour", "derived", "file", "environment", "command line")
"""How sources begin, the lowest first."""
WIDTH = 110
"""Columns of a paragraph."""


def resolved(run: Run) -> dict[str, Any]:
    """Every option by name, JSON-able, with the datasets as a list in `data_backend_config`: a config file that loads again.

    A value that was written with `{env:NAME}` stays so: what a variable holds may be secret. A secret that was written out is
    "***", which no option takes: a config that is loaded again wants it anew.
    """
    parts = [dict(run.__dict__)[name] for name in SECTIONS]
    options = {name: value for part in (*parts, run.family) for name, value in _plain(part).items()}
    shown = {name: masked(run.written.get(name, value), name) for name, value in options.items()}
    entries = (*run.datasets, *run.eval_datasets, *run.conditioning, *run.image_embeds, run.text_embeds)
    return {**shown, "data_backend_config": [_dataset(run, entry) for entry in entries]}


def _plain(section: Section) -> dict[str, Any]:
    return json.loads(section.model_dump_json())


def _dataset(run: Run, entry: Any) -> dict[str, Any]:
    return {key: masked(run.written.get(f"{entry.id}.{key}", value), key) for key, value in _plain(entry).items()}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `resolved` gave, with a dataset's keys as "<id>.<key>", as `Run.sources` names them."""
    entries = config["data_backend_config"]
    own = {f"{entry['id']}.{key}": value for entry in entries for key, value in entry.items()}
    return {**{name: value for name, value in config.items() if name != "data_backend_config"}, **own}


def changes(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configs that `resolved` gave: options with both values, datasets that came or went as such."""
    before, after = ([entry["id"] for entry in config["data_backend_config"]] for config in (former, now))
    both = [one for one in before if one in after]
    listed = [f"dataset {one} was added" for one in after if one not in before]
    listed += [f"dataset {one} was removed" for one in before if one not in after]
    if both != [one for one in after if one in before]:
        listed.append("the datasets stand in another order")
    old, new = (
        flat({**config, "data_backend_config": [entry for entry in config["data_backend_config"] if entry["id"] in both]})
        for config in (former, now)
    )
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return listed + [f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in differing]


def explain(run: Run) -> str:
    """Each value that is not the core's default, under a heading for its source; what a dataset says in one paragraph."""
    config = resolved(run)
    entries = config.pop("data_backend_config")
    blocks: dict[str, list[str]] = {}
    width = max(len(name) for name in config if run.sources[name] != "core")
    for name, value in config.items():
        blocks.setdefault(run.sources[name], []).append(f"  {name:<{width}}  {show(value)}")
    for entry in entries:
        by_source: dict[str, list[str]] = {}
        for key, value in entry.items():
            if key != "id":
                by_source.setdefault(run.sources[f"{entry['id']}.{key}"], []).append(f"{key} {show(value)}")
        for source, pairs in by_source.items():
            blocks.setdefault(source, []).append(_paragraph(f"  dataset {entry['id']}:", pairs))
    blocks.pop("core")
    return "\n".join(line for source in sorted(blocks, key=_rank) for line in (f"{source}:", *blocks[source]))


def _paragraph(head: str, pairs: Sequence[str]) -> str:
    """The pairs by comma, on lines that break between pairs only."""
    lines = [head]
    for place, pair in enumerate(pairs, 1):
        word = f" {pair}" + ("," if place < len(pairs) else "")
        if len(lines[-1]) + len(word) > WIDTH:
            lines.append("     ")
        lines[-1] += word
    return "\n".join(lines)


def _rank(source: str) -> tuple[int, str]:
    """Lowest layer first."""
    return next(place for place, layer in enumerate(LAYERS) if source.startswith(layer)), source
