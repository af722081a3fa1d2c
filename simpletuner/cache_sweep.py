"""Making caches small: what a config does not use goes, and small shards are merged."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.cache_tools import Needed, caches_of, recipe_folders, recipe_in
from simpletuner.config.run import Run
from simpletuner.data.cache import TensorCache
from simpletuner.data.ranks import Alone
from simpletuner.data.shards import read_header, shard_name
from simpletuner.events import Tell
from simpletuner.text_cache import size
from simpletuner.training.staging import locked

__all__ = ["Swept", "sweep"]


@dataclass
class Swept:
    """What `sweep` did, or would do."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Kind -> how many."""
    before_bytes: int = 0
    after_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    """What was left alone, and why."""

    @property
    def text(self) -> str:
        """A line and the notes: "dropped 3 unused items, 1 file .broken; 12 shards merged: 1.2 GiB -> 0.9 GiB"."""
        what = ", ".join(f"{count:,} {kind}" for kind, count in self.dropped.items()) or "nothing to do"
        return "\n".join([f"{what}: {size(self.before_bytes)} -> {size(self.after_bytes)}", *self.notes])


def sweep(run: Run, tell: Tell, *, is_dry: bool, with_other_recipes: bool) -> Swept:
    """Drop what this config does not use, and merge small shards. Raises UserError while a run holds the run folder.

    Folders of other recipes go only if asked for: another config may use them. New shards are whole before old ones go.
    """
    with nullcontext() if is_dry else locked(Path(run.checkpointing.output_dir), Alone(), tell):
        caches = caches_of(run, tell)
        swept = Swept()
        for folder, wants in caches.needed.items():
            swept.before_bytes += _bytes_in(folder)
            own = {want.recipe.digest for want in wants}
            saved = sum(_sweep_recipe(folder, want, swept, is_dry=is_dry) for want in wants)
            for place in recipe_folders(folder):
                saved += _drop(place.glob("*.broken"), "files set aside as .broken", swept, is_dry=is_dry)
                if with_other_recipes and place.name not in own and recipe_in(place) is not None:
                    saved += _size_of(place.rglob("*"))
                    swept.dropped["folders of other recipes"] += 1
                    if not is_dry:
                        shutil.rmtree(place)
            swept.after_bytes += _bytes_in(folder) - (saved if is_dry else 0)
        swept.notes += [f"kept for a set that is not in this config: what {path} names" for path in caches.others]
    return swept


def _sweep_recipe(folder: Path, want: Needed, swept: Swept, *, is_dry: bool) -> int:
    """Rewrite the shards of which something goes, and small ones; the bytes that this saves, about."""
    cache = TensorCache(folder, want.recipe)
    shards = {path: read_header(path)[0] for path in map(cache.folder.joinpath, cache.shards)}
    unknown = 0 if want.is_all_known else sum(key not in want.keys for keys in shards.values() for key in keys)
    if unknown:
        whose = f"{want.unread:,} pictures that were never read" if want.unread else "sets that are not in this config"
        swept.notes.append(f"kept: {unknown:,} items of {cache.folder}, which may be those of {whose}")
    kept: set[str] = set()
    moved: list[str] = []
    old: list[Path] = []
    for path, keys in sorted(shards.items(), key=lambda shard: (-len(shard[1]), shard[0])):
        used = [key for key in keys if key in want.keys or not want.is_all_known]
        fresh = [key for key in used if key not in kept]
        swept.dropped["unused items"] += len(keys) - len(used)
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


def _bytes_in(folder: Path) -> int:
    return sum(_size_of(place.rglob("*")) for place in recipe_folders(folder))


def _size_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
