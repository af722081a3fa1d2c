"""The answer of `simpletuner check` for people."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.checkup import Report
from simpletuner.text_cache import size

__all__ = ["as_text"]

EXCERPT = 100
"""Letters of a prompt that are shown."""


def as_text(report: Report) -> str:
    """All of it, problems last: that is where people look first."""
    return "\n".join([*_data(report), *_work(report), *_room(report), *_verdict(report)])


def _data(report: Report) -> Iterator[str]:
    for dataset, ledger in report.ledgers.items():
        kind = "" if ledger["dataset_type"] == "image" else f" ({ledger['dataset_type']})"
        yield f"{dataset}{kind}: {ledger['found']:,} found = {ledger['used']:,} used + {len(ledger['excluded']):,} excluded"
        yield from (f"  left out  {one['file']}: {one['reason']}  {one['detail']}".rstrip() for one in ledger["excluded"])
        yield from (f"  note      {one['file']}: {one['note']}" for one in ledger["notes"])
        yield "  bucket       pictures  batches/epoch  topped up by"
        for row in report.buckets[dataset]:
            yield f"  {f'{row.width_px}x{row.height_px}':<11}{row.pictures:>10,}{row.batches:>15,}{row.top_ups:>14,}"


def _work(report: Report) -> Iterator[str]:
    yield f"length: {report.length.summary}"
    if report.resumes_at:
        yield f"  goes on from step {report.resumes_at:,}"
    yield f"gallery: {', '.join(report.pictures) or 'none'}"
    for nickname, prompt in report.prompts.items():
        yield f"  {nickname}: {prompt if len(prompt) <= EXCERPT else prompt[:EXCERPT] + '...'}"
    yield "caches:"
    yield from (f"  {stock.text}" for stock in report.caches)


def _room(report: Report) -> Iterator[str]:
    memory = report.memory
    place = "memory" if memory.is_shared else "memory of the device"
    yield f"{place}, estimated: {size(memory.device_bytes)} at most; kernels and the allocator take about a tenth more"
    for stage in memory.stages:
        parts = f"{size(stage.weights_bytes)} lying + {size(stage.work_bytes)} at work"
        yield f"  {stage.name:<44}{size(stage.device_bytes):>12} = {parts}"
    other = memory.otherwise
    if memory.staying:
        yield f"  (beside all that follows, since they encode while training: {', '.join(memory.staying)})"
    yield f"  ({other.name}: {size(other.device_bytes)})"
    yield f"ordinary memory, estimated: {size(memory.ram_bytes)} at most"
    yield "disk, at most:"
    for one in report.writings:
        if one.size_bytes:
            yield f"  {one.what:<60}{size(one.size_bytes):>12}  {one.folder}{' (there already)' if one.is_there else ''}"
    yield from (
        f"  {size(room.needed_bytes)} of {size(room.free_bytes)} free on the disk of {room.folder}" for room in report.rooms
    )
    yield f"hub: {report.endpoint}"
    for each in report.downloads:
        known = "size unknown: the hub could not be asked" if each.size_bytes is None else size(each.size_bytes)
        yield f"  to be downloaded  {each.repository}: {each.part or 'all of it'}  {known}"
    if not report.downloads:
        yield "  nothing is to be downloaded"


def _verdict(report: Report) -> Iterator[str]:
    yield from (f"warning: {warning}" for warning in report.warnings)
    if report.problems:
        yield f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}:"
        yield from (f"\n{problem}" for problem in report.problems)
