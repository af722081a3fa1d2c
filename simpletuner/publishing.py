"""What a run leaves for others: its model card, and the files that are uploaded.

The card's text is `reporting/model_card.py`'s, sending is `reporting/hub.py`'s; here they are told of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.config.run import Run
from simpletuner.data.index import ImageSet
from simpletuner.data.ranks import together
from simpletuner.data.whole import write_whole
from simpletuner.errors import RunError
from simpletuner.events import ResultReady, Tell
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.preflight import Length
from simpletuner.reporting.card_facts import dataset_facts, instance_prompt, kind_of, local_paths, result_files, told_settings
from simpletuner.reporting.hub import HubUploads
from simpletuner.reporting.model_card import CARD, ModelFacts, card, newest_pictures
from simpletuner.training.checkpoints import RESULTS
from simpletuner.training.engine import Engine

__all__ = ["publish", "some_prompt"]


def publish(
    run: Run,
    engine: Engine,
    family: ModelFamily,
    sets: Sequence[ImageSet],
    shots: Sequence[Shot],
    config: Mapping[str, Any],
    length: Length,
    uploads: HubUploads | None,
    tell: Tell,
    *,
    step: int,
    is_new: bool,
) -> None:
    """Write the model card of a run that ended at `step`, and tell which files others may have. Raises RunError.

    Where the result is not new, a card that is there stays: its user may have written in it.
    """
    folder = Path(run.checkpointing.output_dir)

    def write() -> None:
        if engine.rank == 0 and (is_new or not (folder / CARD).exists()):
            write_card(folder, facts_of(run, family, sets, shots, config, length, uploads, step=step))

    together(engine, write)
    tell(ResultReady(result_files(folder, RESULTS[run.model.model_type], newest_pictures(folder, step))))


def facts_of(
    run: Run,
    family: ModelFamily,
    sets: Sequence[ImageSet],
    shots: Sequence[Shot],
    config: Mapping[str, Any],
    length: Length,
    uploads: HubUploads | None,
    *,
    step: int,
) -> ModelFacts:
    """What the card tells of a run that ended at `step`."""
    folder, result = Path(run.checkpointing.output_dir), RESULTS[run.model.model_type]
    repository = uploads.repository if uploads and "/" in uploads.repository else ""
    # The hub's copy lies in a folder of the repository's name, a whole pipeline at its top.
    place = Path(repository.rpartition("/")[2]) if repository else Path()
    place = place if repository and run.model.model_type == "full" else place / result
    base = run.model.pretrained_model_name_or_path or family.flavours[str(run.model.model_flavour)].repository
    return ModelFacts(
        name=repository.rpartition("/")[2] or folder.absolute().name,
        family=run.model.model_family,
        title=family.title,
        kind=kind_of(run),
        base="" if Path(base).expanduser().exists() else base,
        repository=repository,
        step=step,
        length=length.summary,
        usage=family.usage(place, some_prompt(sets, shots)),
        settings=told_settings(run, config),
        datasets=dataset_facts(config, {images.entry.id: used_sizes(images) for images in sets}),
        pictures=newest_pictures(folder, step),
        instance_prompt=instance_prompt(config),
        note=run.hub.model_card_note or "",
        is_safe_for_work=run.hub.model_card_safe_for_work,
        has_average=run.ema.use_ema,
        paths=local_paths(run),
    )


def write_card(folder: Path, facts: ModelFacts) -> None:
    """`README.md` beside the result. Raises RunError."""
    try:
        write_whole(folder / CARD, card(facts).encode(errors="replace"))
    except OSError as error:
        mend = "the weights are saved; make room there, and start the same command again for the card."
        raise RunError(f"The model card {folder / CARD} could not be written: {error}.", mend=mend) from error


def some_prompt(sets: Sequence[ImageSet], shots: Sequence[Shot]) -> str:
    """One to try the result with: the gallery's first, else a caption."""
    return shots[0].prompt if shots else sets[0].captions(int(sets[0].alive()[0]))[0]


def used_sizes(images: ImageSet) -> dict[str, int]:
    """Bucket -> pictures of it that are used: "1024x768" -> 12."""
    counts = Counter(images.bucket_ids[images.alive()].tolist())
    return {"x".join(map(str, images.buckets[bucket])): count for bucket, count in sorted(counts.items())}
