"""`simpletuner check`: everything that can be told of a run before it, without a weight loaded and with nothing encoded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from simpletuner.config.rules_memory import savings
from simpletuner.config.run import Run
from simpletuner.data.cache import TensorCache
from simpletuner.data.encoding import latent_key, latent_recipe
from simpletuner.data.index import ImageSet
from simpletuner.data.prompts import prompt_bytes
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Prompt
from simpletuner.disk import Room, Writing, checkpoint_writings, gallery_writing, rooms, unwritable
from simpletuner.errors import Problem
from simpletuner.estimates import GIB, Largest, Memory, memory_of
from simpletuner.evaluation.clip_score import verify_judge
from simpletuner.events import Tell
from simpletuner.families import load as load_family
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.families.downloads import Download, downloads
from simpletuner.preflight import Bucket, Length, bucket_table, by_use, judged_table, length_of, open_sets, plan_of, shots_of
from simpletuner.text_cache import open_store, size, wanted_prompts
from simpletuner.training.checkpoints import find_checkpoint

__all__ = ["CacheStock", "Report", "inspect"]

SLACK = 1.1
"""Kernels' workspaces and what the allocator cannot hand out, as a factor."""
CUDA_BYTES = GIB // 2
"""What CUDA itself takes of a card."""
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""What a container may use, on Linux with control groups of version 2."""


@dataclass(frozen=True)
class CacheStock:
    """What a cache holds of what the run needs."""

    name: str
    """"pictures of <set>", "prompts (<encoder>)"."""
    needed: int
    missing: int
    item_bytes: int
    """Of one item, at most."""

    @property
    def text(self) -> str:
        """One line: "pictures of cats: 1,204, of which 37 must be encoded; 394.0 KiB each, 14.2 MiB to be written"."""
        rest = f"{self.missing:,} must be encoded" if self.missing else "all are there"
        each = f"{size(self.item_bytes)} each at most, {size(self.needed * self.item_bytes)} in all"
        return f"{self.name}: {self.needed:,}, {rest}; {each}, {size(self.missing * self.item_bytes)} to be written"


@dataclass(frozen=True)
class Report:
    """What `simpletuner check` answers."""

    ledgers: dict[str, dict[str, Any]]
    """As in `ledger.json`."""
    buckets: dict[str, list[Bucket]]
    length: Length
    pictures: list[str]
    """The gallery's pictures: "nickname 1024x1024"."""
    prompts: dict[str, str]
    """Nickname -> the prompt that is rendered."""
    caches: list[CacheStock]
    memory: Memory
    rooms: list[Room]
    writings: list[Writing]
    downloads: list[Download]
    endpoint: str
    """Where the hub is asked."""
    resumes_at: int
    """The step that the run goes on from; 0 for a fresh one."""
    warnings: list[str]
    problems: list[Problem]

    @property
    def exit_code(self) -> int:
        """For scripts: 2 if the run would fail, else 0."""
        return 2 if self.problems else 0

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        totals = {"device_bytes": self.memory.device_bytes, "ram_bytes": self.memory.ram_bytes}
        document = asdict(self)
        document["memory"] |= totals
        return {"version": 1, **document}


def inspect(run: Run, tell: Tell) -> tuple[Report, list[ImageSet]]:
    """Look at everything that needs no weights. Raises what training would raise before any work."""
    family = load_family(run)
    latent = family.latent
    missing = downloads(family.needs())
    if not missing:
        family.verify()
    verify_judge(run, may_fetch=False)
    shots = shots_of(run, family, tell)
    sets = open_sets(run, latent, Alone(), tell)
    trained, judged = by_use(sets)
    stream = plan_of(run, trained)
    tables = {images.entry.id: bucket_table(plan) for images, plan in zip(trained, stream.sets, strict=True)}
    length = length_of(run, stream, ranks=1)
    checkpoint = find_checkpoint(run, tell)
    prompts = wanted_prompts(sets, shots)
    caches = [*_latent_stocks(run, family, sets, is_here=not missing), *_text_stocks(run, family, prompts, is_here=not missing)]
    memory = _memory(run, sets, len(prompts))
    writings = _writings(run, caches, missing, memory, shots, length.steps)
    disks = rooms(writings)
    report = Report(
        ledgers={images.entry.id: images.ledger.as_dict() for images in sets},
        buckets=tables | {images.entry.id: judged_table(images) for images in judged},
        length=length,
        pictures=[f"{shot.nickname} {shot.width_px}x{shot.height_px}" for shot in shots],
        prompts={shot.nickname: shot.prompt for shot in shots},
        caches=caches,
        memory=memory,
        rooms=disks,
        writings=writings,
        downloads=missing,
        endpoint=endpoint(),
        resumes_at=0 if checkpoint is None else checkpoint.step,
        warnings=[*length.warnings, *memory_warnings(run, memory), *room_warnings(disks)],
        problems=[*_folder_problems(run), *room_problems(disks), *torchvision_problems()],
    )
    return report, sets


def endpoint() -> str:
    """Where downloads and uploads go: `HF_ENDPOINT`, or the hub."""
    from huggingface_hub.constants import ENDPOINT

    return ENDPOINT


def _latent_stocks(run: Run, family: ModelFamily, sets: Sequence[ImageSet], *, is_here: bool) -> Iterator[CacheStock]:
    """While the model is not here, what made a cache cannot be told: then all counts as missing."""
    recipe = latent_recipe(family.image_encoder(), run.dtypes.latents) if is_here else None
    channels, item_bytes = family.latent.channels, 4 if run.dtypes.latents == "float32" else 2
    for images in sets:
        alive = images.alive()
        held = 0
        if recipe is not None:
            known = [(sample, images.remembered(sample)) for sample in alive.tolist()]
            keys = [latent_key(each.digest, images.place(sample)) for sample, each in known if each is not None]
            held = int(TensorCache(images.cache_dir, recipe).held(keys).sum()) if keys else 0
        grids = [family.latent.grid(*images.buckets[bucket]) for bucket in set(images.bucket_ids[alive].tolist())]
        largest = max(rows * columns for rows, columns in grids)
        yield CacheStock(f"pictures of {images.entry.id}", len(alive), len(alive) - held, channels * largest * item_bytes)


def _text_stocks(run: Run, family: ModelFamily, prompts: Sequence[Prompt], *, is_here: bool) -> Iterator[CacheStock]:
    store = open_store(run, family) if is_here else None
    for number, encoder in enumerate(family.text_encoders(), start=1):
        name = f"text encoder {number}" if store is None else encoder.recipe.name
        missing = len(prompts) if store is None else len(store.missing(encoder.recipe, prompts))
        yield CacheStock(f"prompts ({name})", len(prompts), missing, prompt_bytes(encoder))


def _memory(run: Run, sets: Sequence[ImageSet], prompts: int) -> Memory:
    largest = [
        max((images.buckets[bucket] for bucket in set(images.bucket_ids[images.alive()].tolist())), key=area) for images in sets
    ]
    return memory_of(
        run,
        trained=Largest(max(largest, key=area), run.training.train_batch_size),
        encoded=[Largest(size_WH, images.entry.vae_batch_size) for size_WH, images in zip(largest, sets, strict=True)],
        prompts=prompts,
    )


def area(size_WH: tuple[int, int]) -> int:
    """Pixels."""
    return size_WH[0] * size_WH[1]


def _writings(
    run: Run, caches: Sequence[CacheStock], missing: Sequence[Download], memory: Memory, shots: Sequence[Shot], steps: int
) -> list[Writing]:
    """All that will lie on disks beside what is there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    *encoders, training = memory.stages
    folders = [entry.cache_dir_vae for entry in run.picture_sets]
    folders += [run.text_embeds.cache_dir] * (len(caches) - len(folders))
    saved = training.trained_bytes + training.state_bytes + training.average_bytes
    # Full tuning ends in a whole pipeline: what encodes comes with it, as large as it is when lent.
    others = sum(stage.weights_bytes for stage in encoders) if run.model.model_type == "full" else 0
    return [
        *(
            Writing(f"the cache of {stock.name}", folder or run.checkpointing.output_dir, stock.missing * stock.item_bytes)
            for stock, folder in zip(caches, folders, strict=True)
        ),
        *(Writing(f"{each.repository}: {each.part}", HF_HUB_CACHE, each.size_bytes or 0) for each in missing),
        *checkpoint_writings(
            run, saved_bytes=saved, result_bytes=training.trained_bytes + training.average_bytes + others, steps=steps
        ),
        gallery_writing(run, shots, steps),
    ]


def _folder_problems(run: Run) -> Iterator[Problem]:
    folders = {"output_dir": run.checkpointing.output_dir, "cache_dir": run.text_embeds.cache_dir}
    folders |= {f"{entry.id}.cache_dir_vae": entry.cache_dir_vae for entry in run.picture_sets}
    found = (unwritable(option, folder) for option, folder in folders.items() if folder is not None)
    yield from (problem for problem in found if problem is not None)


def room_problems(disks: Sequence[Room]) -> Iterator[Problem]:
    """What must be written before the first checkpoint is whole, or hours of work are lost."""
    for room in disks:
        if room.first_bytes > room.free_bytes:
            yield Problem(
                "output_dir",
                f"There is too little room on the disk of {room.folder}: {size(room.free_bytes)} are free.",
                f"caches, downloads and the first checkpoint take up to {size(room.first_bytes)} there.",
                "make room, or choose folders on another disk.",
            )


def room_warnings(disks: Sequence[Room]) -> Iterator[str]:
    """What may become too little later."""
    for room in disks:
        if room.first_bytes <= room.free_bytes < room.needed_bytes:
            yield (
                f"The disk of {room.folder} may become full: the run writes up to {size(room.needed_bytes)} there, and "
                f"{size(room.free_bytes)} are free. `checkpoints_total_limit` keeps fewer checkpoints."
            )


def memory_warnings(run: Run, memory: Memory) -> Iterator[str]:
    """Where the estimate is more than there is: a warning, since it is one."""
    card = run.hardware.memory_bytes
    wanted = int(memory.device_bytes * SLACK) + CUDA_BYTES
    if card is not None and wanted > card:
        name = run.hardware.name or "the card"
        mends = "; or ".join(savings(run))
        yield f"The run takes about {size(wanted)}, but {name} has {size(card)}: {mends}."
    machine = machine_bytes()
    if machine is not None and memory.ram_bytes > machine:
        yield f"The run takes about {size(memory.ram_bytes)} of ordinary memory, and this machine has {size(machine)}."


def machine_bytes() -> int | None:
    """Ordinary memory that this process may use; None where the system does not say."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    granted = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    return whole if granted == "max" else min(whole, int(granted))


def torchvision_problems() -> Iterator[Problem]:
    """A torchvision that was built for another torch. The libraries import it where there is one, and fail at its operators."""
    try:
        wants = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return
    exact = next((match[1] for want in wants if (match := re.fullmatch(r"torch\s*\(?==\s*(\d+\.\d+)[\w.+]*\)?", want))), None)
    torch = metadata.version("torch")
    if exact is None or torch.startswith(f"{exact}."):
        return
    yield Problem(
        "",
        f"torchvision {metadata.version('torchvision')} was built for torch {exact}, but torch {torch} is installed.",
        "importing it fails, and transformers imports it where it is installed; nothing here needs it.",
        "pip uninstall torchvision   (or install the torchvision of this torch)",
    )
