"""Looking after caches: why something would be encoded again, whether all that is there is whole, and what may go.

A cache is found by what made it, so nothing here is needed for right results. The user's pictures are only read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.config.run import Run
from simpletuner.data.cache import TensorCache
from simpletuner.data.encoding import latent_key, latent_recipe
from simpletuner.data.index import ImageSet
from simpletuner.data.precompute import reason_of
from simpletuner.data.prompts import prompt_key
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Prompt, Recipe
from simpletuner.data.shards import ShardError, read_header, shard_name
from simpletuner.errors import DataError, RunError, UserError
from simpletuner.events import Tell
from simpletuner.families import load as load_family
from simpletuner.families.downloads import downloads
from simpletuner.preflight import open_sets, shots_of
from simpletuner.text_cache import size, wanted_prompts
from simpletuner.training.staging import locked

__all__ = ["Caches", "Swept", "caches_of", "sweep", "verify", "why"]

RECIPE_FOLDER = re.compile(r"[0-9a-f]{16}")
SHOWN = 60
"""Letters of a fact that are shown."""


@dataclass(frozen=True)
class Needed:
    """What a run keeps in one recipe's folder."""

    recipe: Recipe
    keys: frozenset[str]
    write_batch_size: int


@dataclass(frozen=True)
class Caches:
    """The caches of a run: cache folder -> what it needs of it."""

    sets: Sequence[ImageSet]
    prompts: Sequence[Prompt]
    latents: Recipe
    texts: tuple[Recipe, ...]
    text_folder: Path
    needed: Mapping[Path, Sequence[Needed]]


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
    latents = latent_recipe(family.image_encoder(), run.dtypes.latents)
    texts = tuple(encoder.recipe for encoder in family.text_encoders())
    assert run.text_embeds.cache_dir is not None, "config/derive.py fills in cache_dir"
    text_folder = Path(run.text_embeds.cache_dir)
    needed: dict[Path, list[Needed]] = {}
    for images in sets:
        needed.setdefault(images.cache_dir, []).append(
            Needed(latents, frozenset(_latent_keys(images)), images.entry.write_batch_size)
        )
    embeds = frozenset(map(prompt_key, prompts))
    needed.setdefault(text_folder, []).extend(Needed(recipe, embeds, run.text_embeds.write_batch_size) for recipe in texts)
    return Caches(sets, prompts, latents, texts, text_folder, needed)


def _latent_keys(images: ImageSet) -> Iterator[str]:
    """Of all pictures that were ever read; of one that changed since, what it was is kept: it may be touched and no more."""
    for sample in images.alive().tolist():
        if (known := images.previous(sample)) is not None:
            yield latent_key(known.digest, images.place(sample))


# why


def why(caches: Caches, target: str) -> list[str]:
    """What is known of a picture (its path, its name within a set, or its stem) or of a prompt. Raises DataError."""
    lines: list[str] = []
    for images in caches.sets:
        for sample in images.alive().tolist():
            if _is_meant(images, sample, target):
                lines += _why_picture(images, sample, caches.latents)
        for one in images.ledger.excluded:
            if target in (one.file, Path(one.file).stem, f"{images.store.root}/{one.file}"):
                lines.append(f"{images.entry.id}/{one.file} is left out: {one.reason} {one.detail}".rstrip())
    for prompt in caches.prompts:
        if prompt.text == target:
            for recipe in caches.texts:
                lines += _why_prompt(prompt, recipe, caches.text_folder)
    if not lines:
        raise DataError(
            f"No set has a picture `{target}`, and it is no prompt of this run.",
            mend="name a picture by its path, or by its path within the set; a prompt by its whole text.",
        )
    return lines


def _is_meant(images: ImageSet, sample: int, target: str) -> bool:
    file = images.file(sample)
    if target in (file, f"{images.entry.id}/{file}", Path(file).stem, Path(file).name):
        return True
    return Path(target).resolve() == Path(images.store.root) / file


def _why_picture(images: ImageSet, sample: int, recipe: Recipe) -> list[str]:
    digest = hashlib.blake2b(images.read(sample), digest_size=16).digest()
    place = images.place(sample)
    key = latent_key(digest, place)
    cut = f"{place.original_WH} -> {place.resized_WH}, cut at {place.corner_XY} to {place.target_WH}"
    head = f"{images.entry.id}/{images.file(sample)}: "
    if TensorCache(images.cache_dir, recipe).has(key):
        return [f"{head}its latents are there ({key}, recipe {recipe.digest}); nothing is encoded.", f"  {cut}"]
    reason = reason_of(images.previous(sample), digest, key, recipe)
    lines = [f"{head}will be encoded: {reason}.", f"  key {key}, recipe {recipe.digest}", f"  {cut}"]
    return lines + _differences(images.cache_dir, recipe)


def _why_prompt(prompt: Prompt, recipe: Recipe, folder: Path) -> list[str]:
    key = prompt_key(prompt)
    head = f'prompt "{prompt.text}" ({prompt.role}), {recipe.name}: '
    if TensorCache(folder, recipe).has(key):
        return [f"{head}its embeds are there ({key}, recipe {recipe.digest}); nothing is encoded."]
    return [f"{head}will be encoded: new or changed.", f"  key {key}, recipe {recipe.digest}", *_differences(folder, recipe)]


def _differences(folder: Path, recipe: Recipe) -> list[str]:
    """What tells other recipes of the same encoder in this folder from the run's."""
    lines = []
    for other in _recipe_folders(folder):
        told = _recipe_in(other)
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
        for place in _recipe_folders(folder):
            items, spoilt = 0, []
            for path in sorted(place.glob("shard-*.safetensors")):
                keys, fault = _read_whole(path)
                items += len(keys)
                if fault:
                    spoilt.append(f"{path}: {fault}; {f'{len(keys):,}' if keys else 'its'} items are lost")
            told = _recipe_in(place)
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
    for folder, wants in caches.needed.items():
        for want in wants:
            held = TensorCache(folder, want.recipe).held(sorted(want.keys)).sum() if want.keys else 0
            if missing := len(want.keys) - int(held):
                place = f"{folder / want.recipe.digest} ({want.recipe.name})"
                yield f"{place}: {missing:,} of {len(want.keys):,} will be made (again)"


# gc


@dataclass
class Swept:
    """What `sweep` did, or would do."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Kind -> how many."""
    before_bytes: int = 0
    after_bytes: int = 0

    @property
    def text(self) -> str:
        """One line: "dropped 3 unused items, 1 file .broken; 12 shards merged: 1.2 GiB -> 0.9 GiB"."""
        what = ", ".join(f"{count:,} {kind}" for kind, count in self.dropped.items()) or "nothing to do"
        return f"{what}: {size(self.before_bytes)} -> {size(self.after_bytes)}"


def sweep(run: Run, tell: Tell, *, is_dry: bool, with_other_recipes: bool) -> Swept:
    """Drop what this config does not use, and merge small shards. Raises UserError while a run holds the run folder.

    Folders of other recipes go only if asked for: another config may use them. New shards are whole before old ones go.
    """
    with nullcontext() if is_dry else locked(Path(run.checkpointing.output_dir), Alone(), tell):
        caches = caches_of(run, tell)
        swept = Swept()
        for folder, wants in caches.needed.items():
            swept.before_bytes += _bytes_in(folder)
            by_recipe: dict[str, Needed] = {}
            for want in wants:
                former = by_recipe.get(want.recipe.digest)
                keys = want.keys | (former.keys if former else frozenset())
                by_recipe[want.recipe.digest] = Needed(want.recipe, keys, want.write_batch_size)
            saved = 0
            for want in by_recipe.values():
                saved += _sweep_recipe(folder, want, swept, is_dry=is_dry)
            for place in _recipe_folders(folder):
                saved += _drop(place.glob("*.broken"), "files set aside as .broken", swept, is_dry=is_dry)
                if with_other_recipes and place.name not in by_recipe and _recipe_in(place) is not None:
                    saved += _size_of(place.rglob("*"))
                    swept.dropped["folders of other recipes"] += 1
                    if not is_dry:
                        shutil.rmtree(place)
            swept.after_bytes += _bytes_in(folder) - (saved if is_dry else 0)
    return swept


def _sweep_recipe(folder: Path, want: Needed, swept: Swept, *, is_dry: bool) -> int:
    """Rewrite the shards of which something goes, and small ones; the bytes that this saves, about."""
    cache = TensorCache(folder, want.recipe)
    shards = {path: read_header(path)[0] for path in map(cache.folder.joinpath, cache.shards)}
    kept: set[str] = set()
    moved: list[str] = []
    old: list[Path] = []
    for path, keys in sorted(shards.items(), key=lambda shard: (-len(shard[1]), shard[0])):
        fresh = [key for key in keys if key in want.keys and key not in kept]
        swept.dropped["unused items"] += sum(key not in want.keys for key in keys)
        swept.dropped["duplicates"] += sum(key in kept for key in keys)
        kept.update(fresh)
        if len(fresh) == len(keys) and len(keys) > want.write_batch_size // 2:
            continue
        moved += fresh
        old.append(path)
    swept.dropped += Counter()  # kinds of which there were none go
    if len(old) == 1 and len(moved) == len(shards[old[0]]):
        return 0  # a lone small shard has nobody to be merged with
    if old:
        swept.dropped["shards merged or rewritten"] += len(old)
    before = _size_of(old)
    if is_dry or not old:
        share = len(moved) / max(sum(len(shards[path]) for path in old), 1)
        return round(before * (1 - share))
    chunks = [moved[first : first + want.write_batch_size] for first in range(0, len(moved), want.write_batch_size)]
    with cache.writer(want.write_batch_size) as writer:
        for chunk in chunks:
            writer.add([(key, cache.get(key)) for key in chunk])
    written = {cache.folder / shard_name(chunk) for chunk in chunks}  # one of them may bear the name of an old one
    for path in set(old) - written:
        path.unlink()
    return before - _size_of(written)


def _drop(paths: Iterable[Path], kind: str, swept: Swept, *, is_dry: bool) -> int:
    found = list(paths)
    saved = _size_of(found)
    if found:
        swept.dropped[kind] += len(found)
    for path in [] if is_dry else found:
        path.unlink()
    return saved


def _recipe_folders(folder: Path) -> list[Path]:
    """The folders in a cache that are named as recipes are."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and RECIPE_FOLDER.fullmatch(path.name))


def _recipe_in(folder: Path) -> dict[str, Any] | None:
    """What the folder says that it was made with; None unless that is what it is named after."""
    try:
        told = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(told, dict) and isinstance(told.get("facts"), dict)
    return told if is_whole and Recipe(str(told.get("name")), told["facts"]).digest == folder.name else None


def _bytes_in(folder: Path) -> int:
    return sum(_size_of(place.rglob("*")) for place in _recipe_folders(folder))


def _size_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
