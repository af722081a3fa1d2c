"""What of a model is not on this machine yet, and how large it is, without fetching any of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.families.repository import Component, Repository, is_index, variant_of

__all__ = ["Download", "downloads", "sizes_on_hub"]

HUB_TIMEOUT_S = 5.0


WITHOUT_WEIGHTS = {"tokenizer": "tokenizer_config.json", "feature_extractor": "preprocessor_config.json"}
"""Components that are settings alone -> the file that tells them."""


@dataclass(frozen=True)
class Download:
    """One part of a model that a run will fetch."""

    repository: str
    part: str
    """A component's sub-folder, or a file; "" is a model that is no pipeline."""
    size_bytes: int | None
    """None: the hub could not be asked."""


def sizes_on_hub(repository: Repository) -> dict[str, int] | None:
    """File -> bytes, by one request; None if nobody answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, revision = HfApi(), repository.revision
    try:
        found = api.model_info(repository.name, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, OSError):
        return None
    return {file.rfilename: file.size for file in found.siblings or () if file.size is not None}


def downloads(
    needs: Iterable[tuple[Repository, str]], ask: Callable[[Repository], Mapping[str, int] | None] = sizes_on_hub
) -> list[Download]:
    """What of these parts must be fetched from the hub, which is asked for their sizes."""
    sizes: dict[tuple[str, str | None], Mapping[str, int] | None] = {}
    missing = []
    for repository, part in needs:
        if _is_here(repository, part):
            continue
        place = repository.name, repository.revision
        if place not in sizes:
            sizes[place] = ask(repository)
        missing.append(Download(repository.name, part, _size(sizes[place], part, repository.variant)))
    return missing


def _is_here(repository: Repository, part: str) -> bool:
    if repository.is_local or part.endswith(".safetensors"):
        return repository.is_local or repository.here(part) is not None
    for kind, file in WITHOUT_WEIGHTS.items():
        if part.startswith(kind):
            return repository.here(f"{part}/{file}") is not None
    config = repository.here(f"{part}/config.json" if part else "config.json")
    if config is None:
        return False
    component = Component(config.parent, repository.variant)
    if not component.weights:
        component = Component(config.parent, None)
    return bool(component.weights) and all(map(Path.exists, _shards(component)))


def _shards(component: Component) -> Iterable[Path]:
    """The files that the component's index names; none where the weights are one file."""
    for index in component.folder.glob("*.json"):
        if is_index(index) and variant_of(index.name) == component.variant:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            yield from (component.folder / name for name in set(named))


def _size(sizes: Mapping[str, int] | None, part: str, variant: str | None) -> int | None:
    if sizes is None:
        return None
    if part in sizes:
        return sizes[part]
    files = {name: size for name, size in sizes.items() if name.rpartition("/")[0] == part}
    weights = {name for name in files if name.endswith(".safetensors")}
    wanted = {name for name in weights if variant_of(name) == variant} or {name for name in weights if variant_of(name) is None}
    small = {name for name in files if name.endswith((".json", ".model", ".txt"))}
    return sum(files[name] for name in wanted | small) or None
