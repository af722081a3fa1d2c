"""Looking after caches: what a run needs of them, why something would be made again, and whether all that is there is whole.

A cache is found by what made it, so nothing here is needed for right results. The user's pictures are only read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from simpletuner.config.run import Run
from simpletuner.data.cache import TensorCache
from simpletuner.data.index import ImageSet
from simpletuner.data.manifest import load_manifest
from simpletuner.data.masks import RECIPE as MASKS
from simpletuner.data.masks import SHARD_ITEMS
from simpletuner.data.pixels import Unreadable
from simpletuner.data.precompute import reason_of
from simpletuner.data.prompts import prompt_key
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Prompt, Recipe
from simpletuner.data.shards import ShardError, read_header
from simpletuner.errors import DataError, RunError, UserError
from simpletuner.events import Tell
from simpletuner.families import load as load_family
from simpletuner.families.downloads import downloads
from simpletuner.preflight import open_sets, shots_of
from simpletuner.stocks import Filled, Kept, kept_pictures
from simpletuner.text_cache import wanted_prompts

__all__ = ["Caches", "Needed", "caches_of", "recipe_folders", "recipe_in", "verify", "why"]

RECIPE_FOLDER = re.compile(r"[0-9a-f]{16}")
SHOWN = 60
"""Letters of a fact that are shown."""


@dataclass(frozen=True)
class Needed:
    """What a run keeps in one recipe's folder."""

    recipe: Recipe
    keys: frozenset[str]
    write_batch_size: int
    unread: int = 0
    """Pictures of which nothing can be looked up, since they were never read: what they have there is not known."""
    is_shared: bool = False
    """Whether sets that are not this run's keep items there of which nothing is known."""

    def __or__(self, other: Needed) -> Needed:
        size, is_shared = max(self.write_batch_size, other.write_batch_size), self.is_shared or other.is_shared
        return replace(
            self, keys=self.keys | other.keys, write_batch_size=size, unread=self.unread + other.unread, is_shared=is_shared
        )

    @property
    def is_all_known(self) -> bool:
        """Whether an item that is not among `keys` is nobody's."""
        return not self.unread and not self.is_shared


@dataclass(frozen=True)
class Caches:
    """The caches of a run."""

    sets: Sequence[ImageSet]
    prompts: Sequence[Prompt]
    pictures: Sequence[Kept]
    texts: tuple[Recipe, ...]
    text_folder: Path
    text_filled: Filled
    needed: Mapping[Path, Sequence[Needed]]
    """Cache folder -> what is needed of it, each recipe once."""
    others: Sequence[Path] = ()
    """Manifests in these folders of sets that are not this run's."""


def caches_of(run: Run, tell: Tell) -> Caches:
    """Find them. Raises UserError where the model is not on this machine: its weights are a part of the recipes."""
    family = load_family(run)
    if missing := downloads(family.needs(), ask=lambda _: None):
        which = ", ".join(f"{each.repository}: {each.part}" for each in missing)
        raise UserError(
            f"The model is not wholly on this machine: {which}.",
            why="what a cache was made with includes the encoders' weights, and nothing is fetched for this.",
            mend="start the training once, which fetches them, or name a folder.",
        )
    sets = open_sets(run, family.latent, Alone(), tell)
    prompts = wanted_prompts(sets, shots_of(run, family, tell))
    # Of a picture that changed since, what it was is needed too: it may have been touched and no more.
    pictures = list(kept_pictures(run, family, sets, known=ImageSet.previous))
    texts = tuple(encoder.recipe for encoder in family.text_encoders())
    assert run.text_embeds.cache_dir is not None, "config/derive.py fills in cache_dir"
    text_folder, text_filled = Path(run.text_embeds.cache_dir), run.text_embeds.filled
    wants: list[tuple[Path, Needed]] = [(kept.images.cache_dir, _needed(kept)) for kept in pictures]
    others = _others(sets)
    wants += [_of_others(folder, want, others) for folder, want in wants]
    embeds = frozenset(map(prompt_key, prompts))
    wants += [(text_folder, Needed(each, embeds, run.text_embeds.write_batch_size)) for each in texts]
    needed: dict[Path, dict[str, Needed]] = {}
    for folder, want in wants:  # one folder may be written in two ways, and what the one way leaves out is not unused
        recipes = needed.setdefault(folder.resolve(), {})
        former = recipes.get(want.recipe.digest)
        recipes[want.recipe.digest] = want if former is None else former | want
    told = {folder: list(recipes.values()) for folder, recipes in needed.items()}
    return Caches(sets, prompts, pictures, texts, text_folder, text_filled, told, sorted(others))


def _needed(kept: Kept) -> Needed:
    assert kept.recipe is not None, "the model is on this machine"
    keys = frozenset(key.decode() for key in kept.keys.tolist())
    size = SHARD_ITEMS if kept.kind == "masks" else kept.images.entry.write_batch_size
    return Needed(kept.recipe, keys, size, kept.unread)


def _others(sets: Sequence[ImageSet]) -> dict[Path, frozenset[str]]:
    """Manifest -> keys of the latents that it names, of sets that are not this run's: disabled ones, or another config's."""
    own = {images.manifest_path.resolve() for images in sets}
    found: dict[Path, frozenset[str]] = {}
    for folder in {path.parent for path in own}:
        for path in set(folder.glob("manifest-*.safetensors")) - own:
            with suppress(SafetensorError):  # what nobody can read says nothing
                if (manifest := load_manifest(path)) is not None:
                    found[path] = frozenset(key.decode() for key in manifest.latent_keys.tolist() if key)
    return found


def _of_others(folder: Path, want: Needed, others: Mapping[Path, frozenset[str]]) -> tuple[Path, Needed]:
    """What they need of the same recipe. Image embeds lie under the keys of latents; of masks a manifest says nothing."""
    here = [keys for path, keys in others.items() if path.parent == folder.resolve()]
    return folder, replace(want, keys=frozenset().union(*here), unread=0, is_shared=bool(here) and want.recipe == MASKS)


# why


def why(caches: Caches, target: str) -> list[str]:
    """What is known of a picture (its path, its name within a set, or its stem) or of a prompt. Raises DataError."""
    lines: list[str] = []
    path = os.path.realpath(target)
    for images in caches.sets:
        for sample in images.alive().tolist():
            if _is_meant(images, images.file(sample), target, path):
                lines += _why_picture(caches, images, sample)
        for one in images.ledger.excluded:
            if _is_meant(images, one.file, target, path):
                lines.append(f"{images.entry.id}/{one.file} is left out: {one.reason} {one.detail}".rstrip())
    for prompt in caches.prompts:
        if prompt.text == target:
            for recipe in caches.texts:
                lines += _why_prompt(caches, prompt, recipe)
    if not lines:
        raise DataError(
            f"No set has a picture `{target}`, and it is no prompt of this run.",
            mend="name a picture by its path, or by its path within the set; a prompt by its whole text.",
        )
    return lines


def _is_meant(images: ImageSet, file: str, target: str, path: str) -> bool:
    """Whether a picture is called `target`, which is `path` if it is a path: in a store without a folder none is."""
    name = file.rpartition("/")[2]
    if target in (file, f"{images.entry.id}/{file}", name, name.rpartition(".")[0] or name):
        return True
    return path.endswith(name) and path == os.path.join(images.store.root, file)


def _why_picture(caches: Caches, images: ImageSet, sample: int) -> list[str]:
    name, place = f"{images.entry.id}/{images.file(sample)}", images.place(sample)
    cut = f"  {place.original_WH} -> {place.resized_WH}, cut at {place.corner_XY} to {place.target_WH}"
    try:
        digest = hashlib.blake2b(images.read(sample), digest_size=16).digest()
    except Unreadable as fault:
        return [f"{name} cannot be read: {fault.reason} {fault.detail}".rstrip()]
    lines = []
    for kept in caches.pictures:
        if kept.images is not images:
            continue
        assert kept.recipe is not None, "the model is on this machine"
        what = "latents" if kept.kind == "pictures" else kept.kind
        key = kept.key_of(sample, digest)
        is_there = TensorCache(images.cache_dir, kept.recipe).has(key)
        reason = "not in the cache"
        if kept.kind == "pictures":  # of the others the manifest remembers nothing
            reason = reason_of(images.previous(sample), digest, key, kept.recipe)
        lines += _told(f"{what} of {name}", key, kept.recipe, kept.filled, images.cache_dir, reason, is_there=is_there)
    return [*lines, cut]


def _why_prompt(caches: Caches, prompt: Prompt, recipe: Recipe) -> list[str]:
    key, head = prompt_key(prompt), f'prompt "{prompt.text}" ({prompt.role}), {recipe.name}'
    is_there = TensorCache(caches.text_folder, recipe).has(key)
    return _told(head, key, recipe, caches.text_filled, caches.text_folder, "new or changed", is_there=is_there)


def _told(head: str, key: str, recipe: Recipe, filled: Filled, folder: Path, reason: str, *, is_there: bool) -> list[str]:
    """What becomes of an item."""
    if filled == "never":
        return [f"{head}: made while training, and not cached."]
    if is_there:
        return [f"{head}: there ({key}, recipe {recipe.digest}); nothing is made."]
    when = " while training" if filled == "ondemand" else ""
    return [f"{head}: will be made{when}: {reason}.", f"  key {key}, recipe {recipe.digest}", *_differences(folder, recipe)]


def _differences(folder: Path, recipe: Recipe) -> list[str]:
    """What tells other recipes of the same encoder in this folder from the run's."""
    lines = []
    for other in recipe_folders(folder):
        told = recipe_in(other)
        if other.name == recipe.digest or told is None or told["name"] != recipe.name:
            continue
        now, then = dict(recipe.facts), told["facts"]
        for name in sorted(now.keys() | then.keys()):
            if json.loads(json.dumps(now.get(name))) != then.get(name):
                lines.append(f"  cached under {other.name}: {name} was {_short(then.get(name))}, now {_short(now.get(name))}")
    return lines


def _short(fact: Any) -> str:
    text = json.dumps(fact, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# verify


def verify(caches: Caches) -> list[str]:
    """Read every shard of every recipe. Raises RunError if one is damaged, after all were read."""
    lines, damaged = [], []
    for folder in caches.needed:
        for place in recipe_folders(folder):
            items, spoilt = 0, []
            for path in sorted(place.glob("shard-*.safetensors")):
                keys, fault = _read_whole(path)
                items += len(keys)
                if fault:
                    spoilt.append(f"{path}: {fault}; {f'{len(keys):,}' if keys else 'its'} items are lost")
            told = recipe_in(place)
            name = "of an unknown recipe" if told is None else told["name"]
            lines.append(f"{place} ({name}): {items:,} items, {len(spoilt)} damaged shards")
            lines += [f"  set aside before: {path.name}" for path in sorted(place.glob("*.broken"))]
            damaged += spoilt
    lines += _missing(caches)
    if damaged:
        raise RunError(
            f"{len(damaged)} shards are damaged:\n" + "\n".join(damaged),
            why="\n      ".join(lines),
            mend="delete these files (a run sets those aside itself whose header is wrong); what was in them is made again.",
        )
    return lines


def _read_whole(path: Path) -> tuple[list[str], str]:
    """The items of a shard, and what is wrong with it or "". Header and size are judged, and every number read."""
    from safetensors import SafetensorError, safe_open

    try:
        keys, _, _ = read_header(path)
    except (ShardError, OSError) as error:
        return [], str(error)
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    return keys, f"{name} holds numbers that are not finite"
    except (SafetensorError, OSError) as error:
        return keys, str(error)
    return keys, ""


def _missing(caches: Caches) -> Iterator[str]:
    """What a run would still have to make."""
    keys = [prompt_key(prompt) for prompt in caches.prompts]
    wants = [
        (f"{kept.kind} of {kept.images.entry.id}", kept.missing, kept.unread + len(kept.keys), kept.filled)
        for kept in caches.pictures
    ]
    for recipe in caches.texts:
        missing = len(keys) - int(TensorCache(caches.text_folder, recipe).held(keys).sum())
        wants.append((f"prompts ({recipe.name})", missing, len(keys), caches.text_filled))
    for name, missing, total, filled in wants:
        if missing and filled != "never":
            yield f"{name}: {missing:,} of {total:,} will be made (again){' while training' if filled == 'ondemand' else ''}"


# folders


def recipe_folders(folder: Path) -> list[Path]:
    """The folders in a cache that are named as recipes are."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and RECIPE_FOLDER.fullmatch(path.name))


def recipe_in(folder: Path) -> dict[str, Any] | None:
    """What the folder says that it was made with; None unless that is what it is named after."""
    try:
        told = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(told, dict) and isinstance(told.get("facts"), dict)
    return told if is_whole and Recipe(str(told.get("name")), told["facts"]).digest == folder.name else None
