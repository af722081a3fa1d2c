"""`simpletuner check`: everything that can be told of a run before it, without a weight loaded and with nothing encoded.

No network is asked but for a hub model's small files, for the sizes of what is missing of it, and for datasets that lie there
themselves. Nothing is written but manifests, and the pictures of a CSV of URLs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from simpletuner.config.rules_memory import savings
from simpletuner.config.run import Run
from simpletuner.data.index import ImageSet
from simpletuner.data.ranks import Alone
from simpletuner.disk import Room, Writing, checkpoint_writings, gallery_writing, rooms, unwritable
from simpletuner.errors import ManyProblems, Problem, SimpletunerError, UserError
from simpletuner.estimates import GIB, Largest, Memory, Workload, memory_of
from simpletuner.evaluation.clip_score import judge_needs, verify_judge
from simpletuner.events import Tell
from simpletuner.families import load as load_family
from simpletuner.families.base import ModelFamily, Shot
from simpletuner.families.downloads import Download, downloads
from simpletuner.preflight import Bucket, Length, bucket_table, by_use, judged_table, length_of, open_sets, plan_of, shots_of
from simpletuner.stocks import CacheStock, held_in_memory, picture_stocks, text_stocks
from simpletuner.text_cache import size, wanted_prompts
from simpletuner.training.checkpoints import find_checkpoint

__all__ = ["JSON_VERSION", "Report", "failed_as_json", "inspect"]

T = TypeVar("T")

JSON_VERSION = 1
"""Of what `check --json` prints: it grows when a key goes or changes its meaning; keys may be added meanwhile."""

SLACK = 1.1
"""Kernels' workspaces and what the allocator cannot hand out, as a factor."""
CUDA_BYTES = GIB // 2
"""What CUDA itself takes of a card."""
LARGE_BYTES = 200 * GIB
"""A cache that is worth a word."""
LIVE = {"pictures": "vae_cache_disable", "prompts": "text_cache_disable"}
"""What does without a cache."""
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""What a container may use, on Linux with control groups of version 2."""


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
        """For `--json`: the fields of this class by their names, sizes in bytes, and the totals of `memory` in it.

        `problems` is empty where the run would start. What is so wrong that the rest cannot be told is `failed_as_json`.
        """
        totals = {"device_bytes": self.memory.device_bytes, "ram_bytes": self.memory.ram_bytes}
        document = asdict(self)
        document["memory"] |= totals
        return {"version": JSON_VERSION, "is_complete": True, **document}


def failed_as_json(error: SimpletunerError) -> dict[str, Any]:
    """For `--json` where nothing else can be told: `is_complete` is false, and `problems` are as in a whole answer."""
    return {"version": JSON_VERSION, "is_complete": False, "problems": [asdict(problem) for problem in error.problems]}


def inspect(run: Run, tell: Tell) -> tuple[Report, list[ImageSet]]:
    """Look at everything that needs no weights. Raises ManyProblems, of all that is wrong, where there is nothing to report."""
    family = load_family(run)
    problems = [*folder_problems(run), *torchvision_problems()]
    is_blocked = any(unwritable(option, folder) for option, folder in set_folders(run).items())  # no set opens without its own
    is_closed = unwritable("output_dir", run.checkpointing.output_dir) is not None
    latent = tried(lambda: family.latent, problems)
    if latent is None:
        raise ManyProblems(problems)
    missing = tried(lambda: _missing_parts(run, family), problems)
    shots = tried(lambda: shots_of(run, family, tell), problems)
    resumes_at = 0 if is_closed else tried(lambda: _resumed_at(run, tell), problems)
    sets = None if is_blocked else tried(lambda: open_sets(run, latent, Alone(), tell), problems)
    if sets is None:
        raise ManyProblems(problems)
    trained, judged = by_use(sets)
    stream = plan_of(run, trained)
    length = tried(lambda: length_of(run, stream, ranks=1), problems)
    if missing is None or shots is None or resumes_at is None or length is None:
        raise ManyProblems(problems)
    tables = {images.entry.id: bucket_table(plan) for images, plan in zip(trained, stream.sets, strict=True)}
    prompts = wanted_prompts(sets, shots)
    is_here = not missing
    caches = [
        *picture_stocks(run, family, sets, is_here=is_here), *text_stocks(run, family, prompts, is_here=is_here)
    ]  # fmt: skip
    memory = memory_of(run, _workload(run, sets, shots, len(prompts), held_in_memory(caches)))
    writings = _writings(run, sets, caches, missing, memory, shots, length.steps)
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
        resumes_at=resumes_at,
        warnings=[*length.warnings, *memory_warnings(run, memory), *cache_warnings(caches), *room_warnings(disks)],
        problems=[*problems, *room_problems(disks, caches)],
    )
    return report, sets


def tried(work: Callable[[], T], problems: list[Problem]) -> T | None:
    """What `work` gives; None where it found that the run would fail, which is added to `problems`."""
    try:
        return work()
    except UserError as error:
        problems += error.problems
        return None


def _missing_parts(run: Run, family: ModelFamily) -> list[Download]:
    """What must be fetched. Raises UserError where what is here is no use."""
    verify_judge(run, may_fetch=False)
    missing = downloads([*family.needs(), *judge_needs(run)])
    if not missing:
        family.verify()
    return missing


def endpoint() -> str:
    """Where downloads and uploads go: `HF_ENDPOINT`, or the hub."""
    from huggingface_hub.constants import ENDPOINT

    return re.sub(r"//[^/@]*@", "//***@", ENDPOINT)  # a mirror's may hold a password


def _resumed_at(run: Run, tell: Tell) -> int:
    checkpoint = find_checkpoint(run, tell)
    return 0 if checkpoint is None else checkpoint.step


def _workload(run: Run, sets: Sequence[ImageSet], shots: Sequence[Shot], prompts: int, held_bytes: int) -> Workload:
    trained, judged = by_use(sets)
    answered = [_largest(images, images.entry.train_batch_size or run.training.train_batch_size) for images in judged]
    answered += [Largest((shot.width_px, shot.height_px), 2) for shot in shots]  # a picture, and what is led away from
    return Workload(
        trained=[_largest(images, images.entry.train_batch_size or run.training.train_batch_size) for images in trained],
        answered=answered,
        encoded=[_largest(images, images.entry.vae_batch_size) for images in sets],
        prompts=prompts,
        is_live=any(images.entry.filled != "before" for images in sets),
        held_bytes=held_bytes,
    )


def _largest(images: ImageSet, batch: int) -> Largest:
    used = [images.buckets[bucket] for bucket in set(images.bucket_ids[images.alive()].tolist())]
    return Largest(max(used, key=lambda size_WH: size_WH[0] * size_WH[1]), batch)


def _writings(
    run: Run,
    sets: Sequence[ImageSet],
    caches: Sequence[CacheStock],
    missing: Sequence[Download],
    memory: Memory,
    shots: Sequence[Shot],
    steps: int,
) -> list[Writing]:
    """All that will lie on disks beside what is there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    *encoders, training = memory.stages
    saved = training.trained_bytes + training.state_bytes + training.average_bytes
    # Full tuning ends in a whole pipeline: what encodes comes with it, as large as it is when lent.
    others = sum(stage.network_bytes for stage in encoders) if run.model.model_type == "full" else 0
    return [
        *(
            Writing(
                f"the downloaded pictures of {images.entry.id}", images.entry.csv_cache_dir, images.file_bytes, is_there=True
            )
            for images in sets
            if images.entry.type == "csv" and images.entry.csv_cache_dir is not None
        ),
        *(
            Writing(f"the cache of {stock.name}", stock.folder, stock.missing_bytes, is_first=stock.filled == "before")
            for stock in caches
        ),
        *(Writing(f"{each.repository}: {each.part}", HF_HUB_CACHE, each.size_bytes or 0) for each in missing),
        *checkpoint_writings(
            run, saved_bytes=saved, result_bytes=training.trained_bytes + training.average_bytes + others, steps=steps
        ),
        gallery_writing(run, shots, steps),
    ]


def folder_problems(run: Run) -> Iterator[Problem]:
    """Folders that cannot be written. What lies within one of them is not told again."""
    folders = {"output_dir": run.checkpointing.output_dir}
    if run.text_embeds.filled != "never":
        folders[f"{run.text_embeds.id}.cache_dir"] = run.text_embeds.cache_dir or ""
    told: list[Path] = []
    for option, folder in (folders | set_folders(run)).items():
        path = Path(folder).expanduser().absolute()
        problem = unwritable(option, folder)
        if problem is not None and not any(path.is_relative_to(other) for other in told):
            told.append(path)
            yield problem


def set_folders(run: Run) -> dict[str, str]:
    """Option -> folder that is written to when a set is opened: its manifest lies there, with or without latents."""
    folders = {}
    for entry in run.picture_sets:
        assert entry.cache_dir_vae is not None, "config/derive.py fills in cache_dir_vae"
        folders[f"{entry.id}.cache_dir_vae"] = entry.cache_dir_vae
        if entry.type == "csv" and entry.csv_cache_dir is not None:
            folders[f"{entry.id}.csv_cache_dir"] = entry.csv_cache_dir
    return folders


def room_problems(disks: Sequence[Room], caches: Sequence[CacheStock]) -> Iterator[Problem]:
    """What must be written before the first checkpoint is whole, or hours of work are lost."""
    instead = sorted(
        {LIVE[stock.kind] for stock in caches if stock.kind in LIVE and stock.filled == "before" and stock.missing}
    )
    more = f"; {' and '.join(instead)} encode while training, without a cache" if instead else ""
    for room in disks:
        if room.first_bytes > room.free_bytes:
            yield Problem(
                "output_dir",
                f"There is too little room on the disk of {room.folder}: {size(room.free_bytes)} are free.",
                f"caches, downloads and the first checkpoint take up to {size(room.first_bytes)} there.",
                f"make room, or choose folders on another disk{more}.",
            )


def cache_warnings(caches: Sequence[CacheStock]) -> Iterator[str]:
    """Caches that are larger than most people think of."""
    for stock in caches:
        if stock.kind in LIVE and stock.missing_bytes > LARGE_BYTES:
            instead = f"`{LIVE[stock.kind]}` encodes while training, without a cache."
            yield f"The cache of {stock.name} takes up to {size(stock.missing_bytes)}. {instead}"


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
