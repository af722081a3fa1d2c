"""The prompts of a run, encoded ahead of it: what `simpletuner text-cache` does, and what training does with the same code.

Only tokenizers and text encoders are loaded, one after another, and only where something is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.run import Run
from simpletuner.data.index import ImageSet
from simpletuner.data.prompts import PromptStore, prompt_bytes, training_prompts
from simpletuner.data.ranks import Alone, Ranks
from simpletuner.data.samples import Prompt
from simpletuner.errors import RunError, UserError
from simpletuner.evaluation.prompts import prompts_of
from simpletuner.events import Tell
from simpletuner.families import load as load_family
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.preflight import open_sets, shots_of

__all__ = ["Stock", "fill", "fill_prompts", "open_store", "take_stock", "verify", "wanted_prompts"]

NAMED = 5


@dataclass(frozen=True)
class Stock:
    """What one text encoder's cache holds of a run's prompts."""

    encoder: str
    prompts: int
    missing: int
    item_bytes: int
    """Of one prompt, at most."""

    @property
    def text(self) -> str:
        """One line: "clip-g: 1,204 prompts, 37 missing; 394 KiB each, 463.6 MiB in all (14.2 MiB still to be written)"."""
        each, whole, rest = (size(count * self.item_bytes) for count in (1, self.prompts, self.missing))
        line = f"{self.encoder}: {self.prompts:,} prompts, {self.missing:,} missing; {each} each, {whole} in all"
        return f"{line} ({rest} still to be written)" if self.missing else line


def open_store(run: Run, family: ModelFamily) -> PromptStore:
    """The embeds of the run's prompts, as far as they are there."""
    assert run.text_embeds.cache_dir is not None, "config/derive.py fills in cache_dir"
    return PromptStore(
        Path(run.text_embeds.cache_dir),
        [encoder.recipe for encoder in family.text_encoders()],
        write_batch_size=run.text_embeds.write_batch_size,
        text_encoder_batch_size=run.text_embeds.text_encoder_batch_size,
    )


def wanted_prompts(sets: Sequence[ImageSet], shots: Sequence[Shot]) -> list[Prompt]:
    """Every caption, what stands for a dropped one, and the gallery's prompts: each once."""
    return list(dict.fromkeys([*training_prompts(sets), *prompts_of(shots)]))


def fill_prompts(
    store: PromptStore, family: ModelFamily, prompts: Sequence[Prompt], *, device: str, ranks: Ranks, tell: Tell
) -> None:
    """Encode what is missing, one encoder in memory at a time."""
    for encoder in family.text_encoders():
        store.fill(encoder, prompts, device=device, ranks=ranks, tell=tell)


def fill(run: Run, *, device: str, ranks: Ranks, tell: Tell) -> list[Stock]:
    """Encode every prompt of the run. Raises DataError where pictures have no caption."""
    family = load_family(run)
    prompts = _prompts(run, family, ranks, tell)
    fill_prompts(open_store(run, family), family, prompts, device=device, ranks=ranks, tell=tell)
    return _stock(run, family, prompts)


def take_stock(run: Run, tell: Tell) -> list[Stock]:
    """Count, and load nothing."""
    family = load_family(run)
    return _stock(run, family, _prompts(run, family, Alone(), tell))


def verify(run: Run, tell: Tell) -> list[Stock]:
    """Read everything back. Raises RunError if a prompt is missing, or its embeds are not finite numbers."""
    family = load_family(run)
    prompts = _prompts(run, family, Alone(), tell)
    stock, store = _stock(run, family, prompts), open_store(run, family)
    missing = {prompt for encoder in family.text_encoders() for prompt in store.missing(encoder.recipe, prompts)}
    spoiled = [p for p in prompts if p not in missing and not all(part.isfinite().all() for part in store.get(p).values())]
    for kind, bad in (("not in the cache", [p for p in prompts if p in missing]), ("not finite", spoiled)):
        if bad:
            named = ", ".join(f'"{prompt.text}"' for prompt in bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
            raise RunError(
                f"{len(bad):,} of {len(prompts):,} prompts are {kind} in {run.text_embeds.cache_dir}: {named}",
                mend="run `simpletuner text-cache` for this config"
                + (" with a text encoder in float32." if kind == "not finite" else "."),
            )
    return stock


def _prompts(run: Run, family: ModelFamily, ranks: Ranks, tell: Tell) -> list[Prompt]:
    if run.text_embeds.text_cache_disable:
        what = "There is no cache of prompts to look after: `text_cache_disable` is set."
        raise UserError(what, "captions are encoded while training, and none is written.", "Set it to false.")
    shots = shots_of(run, family, tell)
    return wanted_prompts(open_sets(run, family.latent, ranks, tell), shots)


def _stock(run: Run, family: ModelFamily, prompts: Sequence[Prompt]) -> list[Stock]:
    store = open_store(run, family)
    return [
        Stock(encoder.recipe.name, len(prompts), len(store.missing(encoder.recipe, prompts)), prompt_bytes(encoder))
        for encoder in family.text_encoders()
    ]


def size(count: float) -> str:
    """Bytes for people: "394.0 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
