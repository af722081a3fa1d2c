"""The page of `simpletuner check --report`: what will be trained on, to look at. One file, no scripts, all within."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.checkup import Report
from simpletuner.data.index import ImageSet
from simpletuner.data.pixels import Unreadable, read_mask, read_pixels
from simpletuner.data.whole import write_whole
from simpletuner.errors import UserError
from simpletuner.preflight import Bucket
from simpletuner.text_cache import size

__all__ = ["page", "write_page"]

SAMPLES = 24
"""Crops of each set."""
SAMPLE_PX = 320
"""Longer edge of a crop as it is shown."""
CAPTIONS = 8
"""Alternatives of a picture that are shown."""
SHADE = 0.2
"""How bright a picture is where its mask is black."""
LISTED = 500
"""Excluded files, and notes, that are listed; the others are counted."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Should an escape ever be forgotten, a browser still runs and fetches nothing."""
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667079; --back: #fff; --card: #f4f5f7; --line: #dde1e6;
  --bar: #3b7dd8; --bad: #c0392b; --warn: #96610f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #98a2ac; --back: #14171a; --card: #1e2327;
  --line: #30373d; --bar: #5b9bea; --bad: #ff7b6b; --warn: #e5b454; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.fact { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; } .fact b { display: block; font-size: 1.15rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .35rem .75rem; align-items: center;
  font-variant-numeric: tabular-nums; }
.bar { height: 1rem; background: var(--bar); border-radius: .2rem; min-width: 2px; }
.crops { columns: 11rem; column-gap: .75rem; }
figure { margin: 0 0 .75rem; break-inside: avoid; background: var(--card); border-radius: .5rem; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; } figcaption { padding: .5rem .7rem; font-size: .85rem; }
figcaption small { display: block; color: var(--soft); } li { margin: .15rem 0; }
details { margin: .5rem 0; } summary { cursor: pointer; } pre { white-space: pre-wrap; margin: .5rem 0; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } td, th { text-align: left; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
"""


def write_page(report: Report, sets: Sequence[ImageSet], path: Path) -> None:
    """Write it, whole or not at all. Raises UserError for a place in a folder of pictures, or one that cannot be written."""
    place = path.expanduser().absolute()
    for name, folder in _folders(sets):
        if place.resolve().is_relative_to(folder):
            raise UserError(
                f"The report would be written to {path}, in the folder of dataset `{name}`.",
                why="nothing is ever written into a folder of pictures.",
                mend="name another folder.",
            )
    try:
        write_whole(place, page(report, sets).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(
            f"The report {path} cannot be written: {error.strerror or error}.", mend="name another file."
        ) from error


def _folders(sets: Sequence[ImageSet]) -> Iterator[tuple[str, Path]]:
    """The user's own folders, by the dataset that they are of."""
    for images in sets:
        for folder in (images.entry.instance_data_dir, images.entry.dataset_name):  # the second may be a name on the hub
            if folder is not None:
                yield images.entry.id, Path(folder).expanduser().resolve()
        if images.masks is not None:
            yield images.masks.id, images.masks.root


def page(report: Report, sets: Sequence[ImageSet]) -> str:
    """The document. Captions and names are the user's: every one is escaped."""
    body = [*_head(report), *(line for images in sets for line in _dataset(report, images))]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>simpletuner check</title><style>{STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _head(report: Report) -> Iterator[str]:
    used = sum(ledger["used"] for ledger in report.ledgers.values() if ledger["dataset_type"] == "image")
    yield f"<h1>What will be trained on</h1><p class=soft>{escape(report.length.summary)}</p>"
    for problem in report.problems:
        yield f"<pre class=bad>{escape(str(problem))}</pre>"
    for warning in report.warnings:
        yield f"<p class=warn>{escape(warning)}</p>"
    missing = sum(stock.missing for stock in report.caches)
    facts = {
        "pictures": f"{used:,}",
        "optimiser steps": f"{report.length.steps:,}",
        "memory, estimated": size(report.memory.device_bytes),
        "still to be encoded": f"{missing:,} items" if missing else "nothing",
        "pictures in a gallery": f"{len(report.pictures):,}",
        "to be downloaded": f"{len(report.downloads)} parts" if report.downloads else "nothing",
    }
    yield "<div class=facts>"
    yield from (f"<div class=fact><b>{escape(value)}</b><span class=soft>{name}</span></div>" for name, value in facts.items())
    yield "</div>"
    if report.prompts:
        rows = (f"<tr><td>{escape(name)}<td>{escape(prompt)}" for name, prompt in report.prompts.items())
        yield f"<h2>Prompts of the gallery</h2><table>{''.join(rows)}</table>"


def _dataset(report: Report, images: ImageSet) -> Iterator[str]:
    name = images.entry.id
    ledger = report.ledgers[name]
    is_trained = ledger["dataset_type"] == "image"
    yield f"<h2>{escape(name)}</h2>"
    yield f"<p class=soft>{ledger['found']:,} found = {ledger['used']:,} used + {len(ledger['excluded']):,} left out</p>"
    if not is_trained:
        yield "<p class=soft>Judged by, and never trained on.</p>"
    if images.masks is not None:
        yield f"<p class=soft>Masks: {escape(images.masks.id)}. What is dark does not count.</p>"
    yield "<h3>Buckets</h3>"
    yield from _histogram(report.buckets[name])
    yield f"<h3>As they are {'trained' if is_trained else 'judged'}</h3><div class=crops>"
    yield from (_sample(images, sample) for sample in _chosen(images))
    yield "</div>"
    excluded = [(one["file"], one["reason"], one["detail"]) for one in ledger["excluded"]]
    yield from _list("Left out", excluded, is_open=True)
    yield from _list("Notes", [(one["file"], one["note"], "") for one in ledger["notes"]], is_open=False)


def _histogram(rows: Sequence[Bucket]) -> Iterator[str]:
    most = max(row.pictures for row in rows)
    yield "<div class=bars>"
    for row in sorted(rows, key=lambda row: row.width_px / row.height_px):
        top_ups = f" <span class=soft>+{row.top_ups} again</span>" if row.top_ups else ""
        yield f"<span>{row.width_px}&times;{row.height_px}</span>"
        yield f'<div class=bar style="width:{100 * row.pictures / most:.1f}%"></div><span>{row.pictures:,}{top_ups}</span>'
    yield "</div>"


def _chosen(images: ImageSet) -> list[int]:
    """Samples to show: evenly over all, sorted by bucket, so that each bucket shows by its share."""
    alive = images.alive()
    ordered = alive[np.argsort(images.bucket_ids[alive], kind="stable")]
    places = np.linspace(0, len(ordered) - 1, min(SAMPLES, len(ordered))).round().astype(int)
    return ordered[places].tolist()


def _sample(images: ImageSet, sample: int) -> str:
    width, height = images.buckets[images.bucket_ids[sample]]
    file = f"<small>{escape(images.file(sample))}<br>{width}&times;{height}</small>"
    captions = images.captions(sample)
    texts = "".join(f"<li>{escape(text)}" for text in captions[:CAPTIONS])
    texts += f"<li>and {len(captions) - CAPTIONS:,} more" if len(captions) > CAPTIONS else ""
    said = f"<ul>{texts}</ul>" if len(captions) > 1 else escape(captions[0])
    try:
        picture = f'<img src="{_data_uri(images, sample)}" alt="" loading="lazy" width={width} height={height}>'
    except Unreadable as fault:
        picture = f"<p class=bad>&nbsp;{escape(fault.reason)} {escape(fault.detail)}</p>"
    return f"<figure>{picture}<figcaption>{said}{file}</figcaption></figure>"


def _data_uri(images: ImageSet, sample: int) -> str:
    """The picture's crop, as training sees it, made small; dark where its mask says so. Raises Unreadable."""
    place = images.place(sample)
    pixels_3HW = (read_pixels(images.read(sample), place) + 1) * 127.5
    if images.masks is not None and (mask := images.masks.of(images.file(sample))) is not None:
        pixels_3HW *= SHADE + (1 - SHADE) * read_mask(images.masks.read(mask), place)
    colours_HW3 = pixels_3HW.round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(colours_HW3)
    picture.thumbnail((SAMPLE_PX, SAMPLE_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _list(title: str, rows: Sequence[tuple[str, str, str]], *, is_open: bool) -> Iterator[str]:
    if not rows:
        return
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in rows[:LISTED])
    more = f"<p class=soft>and {len(rows) - LISTED:,} more</p>" if len(rows) > LISTED else ""
    yield f"<details{' open' if is_open else ''}><summary>{title}: {len(rows):,}</summary>"
    yield f"<table>{lines}</table>{more}</details>"
